"""Worker processes that end early, are interrupted or lose their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from corpus import ENGINE, MODEL, TOOLS, ids_of, preprocess, read_dataset, texts, write_jsonl
from megatron_slm.corpus.preprocessing.pool import over_all_cores
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.errors import UserError

TIMEOUT = 120  # seconds
TEXTS = texts()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise TimeoutError


class Running:
    """The tool in the middle of its work, with two workers."""

    def __init__(self, directory: Path) -> None:
        self.source = write_jsonl(directory / "in.jsonl", TEXTS * 30)
        self.prefix = directory / "out"
        command = [sys.executable, TOOLS / "preprocess_data.py", "--input", self.source]
        command += ["--output-prefix", self.prefix, "--tokenizer-model", MODEL, *ENGINE]
        self.process = subprocess.Popen(
            [*command, "--workers", "2", "--shard-size", "2M"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for(lambda: len(list(directory.glob("out_shards/*.bin.*.partial"))) == 2)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.workers = [int(pid) for pid in children.read_text().split()]
        assert len(self.workers) == 2

    def finish(self) -> tuple[int, str]:
        """Exit code and stderr, when no process is left and no dataset either."""
        with self.process as process:
            _, err = process.communicate(timeout=TIMEOUT)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.workers))
        assert not list(self.prefix.parent.glob("out_text_document*"))
        return self.process.returncode, err


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    tool = Running(tmp_path)
    yield tool
    with suppress(ProcessLookupError):
        os.killpg(tool.process.pid, signal.SIGKILL)
    tool.process.wait()


def test_workers_end_with_their_parent(running: Running) -> None:
    running.process.kill()
    assert running.finish()[0] == -signal.SIGKILL
    preprocess(running.source, running.prefix, "--shard-size", "2M")
    expected = [ids_of(text, eod=False) for text in TEXTS]
    assert read_dataset(f"{running.prefix}_text_document") == expected * 30
    assert not list(running.prefix.parent.rglob("*.partial"))


def test_killed_worker(running: Running) -> None:
    os.kill(running.workers[0], signal.SIGKILL)
    code, err = running.finish()
    assert code == 2
    assert "a worker process ended early" in err and "Traceback" not in err


class Deadly(int):
    """What adds it up is killed."""

    def __radd__(self, other: Any) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_killed_worker_in_the_middle_of_counting() -> None:
    """It keeps nothing that others wait for."""

    def work(task: Task, progress: Any) -> dict[str, Any]:
        progress(Deadly(), 0, 0, 0)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(UserError, match="a worker process ended early"):
        list(over_all_cores("count", [Task("a", ()), Task("b", ())], work, 2))


def test_killed_worker_that_has_no_more_to_do(tmp_path: Path) -> None:
    """Its result is in already, and the other ends."""

    def work(task: Task, progress: Any) -> int:
        if task.name == "killed":
            (tmp_path / "pid").write_text(str(os.getpid()))
        else:
            wait_for((tmp_path / "received").exists)
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        return len(task.name)

    found = {}
    for task, result in over_all_cores("count", [Task("killed", ()), Task("other", ())], work, 2):
        found[task.name] = result
        (tmp_path / "received").touch()
    assert found == {"killed": 6, "other": 5}


def test_interrupt(running: Running) -> None:
    os.killpg(running.process.pid, signal.SIGINT)  # as Ctrl-C: to the workers, too
    code, err = running.finish()
    assert code == 130 and "Traceback" not in err


def test_bad_input_in_a_worker(tmp_path: Path) -> None:
    """A truncated file ends the run, with what the other worker does."""
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    bad = tmp_path / "bad.jsonl.gz"
    import gzip

    bad.write_bytes(gzip.compress(good.read_bytes())[:-3000])
    command = [sys.executable, TOOLS / "preprocess_data.py", "--input", good, bad]
    command += ["--output-prefix", tmp_path / "out", "--tokenizer-model", MODEL, *ENGINE]
    run = subprocess.run(
        [*command, "--workers", "2", "--shard-size", "50K"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: {bad} is truncated")
