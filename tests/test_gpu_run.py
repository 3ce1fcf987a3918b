"""tests/gpu/run.sh where there is no GPU: it says so, or does what a CPU can."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launch import REPOSITORY, SUPPORT

GPU = REPOSITORY / "tests" / "gpu"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(GPU / "run.sh"), *options],
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


RANK = """
import os, sys, time
print("waiting", flush=True)
open(os.environ["RANK_FILE"], "w").write(str(os.getpid()))
time.sleep(600)
"""
CHECK = f"""
import os, sys
sys.path[:0] = {[str(GPU), str(SUPPORT)]!r}
from pathlib import Path
import table, training
args = table.arguments("")
print("| measured | 1 |  |  |", flush=True)
if args.small:  # as one that does not look at the time
    del os.environ["CHECK_ENDS"]
training.train(Path(os.environ["RANK_FILE"] + "-run"), "", module="rank")
"""


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_check_that_is_too_slow(
    ends_itself: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What it has measured is kept, what its run says is shown, and the ranks end with it."""
    monkeypatch.syspath_prepend(str(GPU))
    import run as checks

    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "losses.py").write_text(CHECK)
    monkeypatch.setattr(checks, "HERE", tmp_path)
    monkeypatch.setitem(checks.SECONDS, "losses", 20)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RANK_FILE", str(tmp_path / "rank"))
    lines, right = checks.run("losses", [] if ends_itself else ["--small"])
    assert lines == ["| measured | 1 |  |  |"] and not right
    said = capfd.readouterr().out
    if ends_itself:  # 5 s before it would be ended, which a busy machine may need
        assert "not done in the check's time: ['waiting" in said
    else:
        assert "| losses | took over 20 s |  | WRONG |" in said
    deadline = time.monotonic() + 60
    while runs(int((tmp_path / "rank").read_text())):
        assert time.monotonic() < deadline, "the rank still runs"
        time.sleep(0.1)


def runs(process: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    return False


PART_FAILS = f"""
import sys
sys.path.insert(0, {str(GPU)!r})
from table import attempt, row
with attempt("first"):
    raise RuntimeError("no room")
row("second", "1")
"""


def test_a_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others are measured, and it is shown why."""
    monkeypatch.syspath_prepend(str(GPU))
    import run as checks

    (tmp_path / "steps.py").write_text(PART_FAILS)
    monkeypatch.setattr(checks, "HERE", tmp_path)
    lines, right = checks.run("steps", [])
    assert lines == [
        "| first | RuntimeError: no room | that it runs | WRONG |",
        "| second | 1 |  |  |",
    ]
    assert not right
    assert "Traceback" in capfd.readouterr().out


def test_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import run as checks

    assert sum(checks.SECONDS.values()) <= 15 * 60


def test_runs_on_a_gpu_compile_what_megatron_compiles() -> None:
    """torch.compile stays what it is there; only runs on the CPU platform do without."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, training; print(os.getenv('TORCHDYNAMO_DISABLE'))"],
        env={name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
        | {"PYTHONPATH": f"{GPU}{os.pathsep}{SUPPORT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["None"]
