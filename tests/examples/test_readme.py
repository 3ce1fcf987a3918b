"""The commands of getting-started.md and of README.md run as they are printed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch import REPOSITORY, recipe_environment


def block(page: str, heading: str) -> str:
    """Return the first block of shell commands under a heading."""
    section = (REPOSITORY / page).read_text().split(f"\n{heading}\n")[1]
    return section.split("```bash\n")[1].split("```")[0]


def run(commands: str, directory: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=directory,
        env=recipe_environment(1, PYTHONPATH=REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the first commands in a copy of the repository; return it and what they printed."""
    directory = tmp_path_factory.mktemp("root")
    for name in ("examples", "tools"):
        (directory / name).symlink_to(REPOSITORY / name)
    return directory, run(block("docs/getting-started.md", "## A run of your own"), directory)


def test_first_commands(first: tuple[Path, str]) -> None:
    """From text to a reference and a policy that trains by it."""
    directory, stdout = first
    for name in ("reference", "policy"):
        tracker = directory / "runs" / "first" / name / "latest_checkpointed_iteration.txt"
        assert tracker.read_text() == "20"
    ratios = re.findall(r"selected ratio: (\S+)", stdout)
    assert ratios and all(abs(float(ratio) - 0.6) < 0.001 for ratio in ratios[-4:])


def test_three_commands(first: tuple[Path, str]) -> None:
    """README's, with a model and data of those names, on one rank."""
    directory, _ = first
    model = re.search(
        r'^MODEL=".*?"$', block("docs/getting-started.md", "## A run of your own"), re.S | re.M
    )
    assert model is not None
    shorter = re.sub(r"--(train-iters|eval-interval|save-interval) 20", r"--\1 2", model[0])
    files = """
        mkdir data
        ln -s runs/first/text/noisy.jsonl web.jsonl
        ln -s runs/first/tokenizer.model .
        for end in bin idx; do ln -s ../runs/first/clean_text_document.$end data; done
    """
    printed = block("README.md", "## Train").replace("--nproc_per_node 8", "--nproc_per_node 1")
    stdout = run(f"{files}\n{shorter}\n{printed}", directory)
    for name in ("reference", "policy"):
        assert (directory / name / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert "selected ratio" in stdout
