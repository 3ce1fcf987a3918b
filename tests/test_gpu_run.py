"""tests/gpu/run.sh where there is no GPU: it says so, or does what a CPU can."""

from __future__ import annotations

import os
import subprocess

import torch

from launch import REPOSITORY


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPOSITORY / "tests" / "gpu" / "run.sh"), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_without_a_gpu() -> None:
    done = run()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: there is no GPU here")


def test_what_a_cpu_can_do() -> None:
    """Of the checks the quick ones; a table with versions, and nothing wrong in it."""
    done = run("--device", "cpu", "--small", "--only", "exactness", "head", "steps", "waits")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"| torch | {torch.__version__.split('+')[0]}" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stdout.count("| ok |") > 10
    assert "| seconds a step | skipped: a billion parameters are for a GPU |" in done.stdout
    assert done.stdout.splitlines()[-1] == "all is right"
