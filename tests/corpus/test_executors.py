"""examples/slurm/preprocess.sbatch and tools/preprocess_with_datatrove.py: many jobs that share a
directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from corpus import (
    ENGINE,
    MODEL,
    TOOLS,
    ids_of,
    preprocess,
    read_dataset,
    run_tool,
    texts,
    write_jsonl,
)
from megatron_slm.corpus.preprocessing import executors
from megatron_slm.corpus.preprocessing.settings import PreprocessingSettings

TIMEOUT = 120  # seconds
TEXTS = texts()
SCRIPT = TOOLS.parent / "examples" / "slurm" / "preprocess.sbatch"
SBATCH = """#!/usr/bin/env bash
# Queues a job: its options and the command are a file whose name is its number.
job=$(ls "$QUEUE" | wc -l)
printf '%s\\0' "$@" > "$QUEUE/$job"
echo "$job"
"""


class Slurm:
    """Takes jobs by an sbatch of its own, and runs them."""

    def __init__(self, directory: Path) -> None:
        self.queue = directory / "queue"
        self.queue.mkdir()
        self.done: set[str] = set()
        sbatch = directory / "bin" / "sbatch"
        sbatch.parent.mkdir()
        sbatch.write_text(SBATCH)
        sbatch.chmod(0o755)
        path = f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        # Also from a shell that is a job itself.
        outer = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "1"}
        self.environment = os.environ | outer | {"PATH": path, "QUEUE": str(self.queue)}

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            check=False,
            capture_output=True,
            text=True,
            cwd=TOOLS.parent,
            env=self.environment | environment,
            timeout=TIMEOUT,
        )

    def work(self) -> list[str]:
        """Run what is queued, the last job that may run before all others, and the last element of
        an array before the first; returns the stages."""
        waiting = {
            path.name: path.read_text().split("\0")[:-1]
            for path in self.queue.iterdir()
            if path.name not in self.done
        }
        stages = []
        while waiting:
            job = max(
                (
                    job
                    for job, words in waiting.items()
                    if not waiting.keys() & set(_option(words, "--dependency").split(":")[1:])
                ),
                key=int,
            )
            words = waiting.pop(job)
            self.done.add(job)
            command = words[words.index(str(SCRIPT)) :]
            first, _, last = _option(words, "--array").partition("-")
            elements = range(int(first), int(last or first) + 1) if first else [0]
            for element in reversed(elements):
                place = {"SLURM_ARRAY_TASK_ID": str(element)} if first else {}
                place["SLURM_ARRAY_TASK_COUNT"] = str(len(elements))
                result = self.run("bash", *command, **place)
                assert result.returncode == 0, result.stderr
                stages.append(command[1])
        return stages


def _option(words: list[str], name: str) -> str:
    found = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    return found[0] if found else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def options(directory: Path) -> list[object]:
    source = write_jsonl(directory / "in.jsonl", TEXTS * 2)
    found = ["--input", source, "--output-prefix", directory / "out", "--tokenizer-model", MODEL]
    return [*found, *ENGINE, "--shard-size", "90K"]


def test_slurm_array(slurm: Slurm, tmp_path: Path) -> None:
    """Stages wait for those before them."""
    submitted = slurm.run("bash", SCRIPT, "2", *options(tmp_path), "--dedup", "exact")
    assert submitted.returncode == 0, submitted.stderr
    stages = ["fingerprint", "fingerprint", "duplicates", "tokenize", "tokenize", "all"]
    assert slurm.work() == stages
    kept = [ids_of(text, eod=False) for text in dict.fromkeys(TEXTS)]
    assert read_dataset(tmp_path / "out_text_document") == kept


def test_slurm_element_again(slurm: Slurm, tmp_path: Path) -> None:
    """One element of an array, which was lost, makes its shards and no other."""
    command = (SCRIPT, "tokenize", "3", *options(tmp_path))
    names = []
    for element in (2, 0, 1):
        before = {path.name for path in tmp_path.glob("out_shards/*.json")}
        slurm.run("sbatch", f"--array={element}", *command)
        slurm.work()
        names.append({path.name for path in tmp_path.glob("out_shards/*.json")} - before)
    in_order = sorted(name for found in names for name in found)
    assert [sorted(found) for found in names] == [in_order[at::3] for at in (2, 0, 1)]
    assert all(names)


def test_slurm_has_no_standard_input(slurm: Slurm, tmp_path: Path) -> None:
    submitted = slurm.run("bash", SCRIPT, "2", "--input", "-", "--output-prefix", tmp_path / "out")
    assert submitted.returncode == 2 and "--input -" in submitted.stderr
    assert not list(slurm.queue.iterdir())


@pytest.mark.parametrize("cleaning", [(), ("--dedup", "exact")])
def test_datatrove_makes_the_same(tmp_path: Path, cleaning: tuple[str, ...]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS * 2)
    options = ("--append-eod", "--shard-size", "50K", *cleaning, *ENGINE)
    preprocess(source, tmp_path / "alone", *options)
    command = [sys.executable, TOOLS / "preprocess_with_datatrove.py", "--input", source, *options]
    command += ["--tokenizer-model", MODEL, "--output-prefix", tmp_path / "out", "--workers", "4"]
    command += ["--tasks", "2", "--logging-dir", tmp_path / "logs"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stderr
    for suffix in ("bin", "idx", "manifest.json"):
        ours, alone = (tmp_path / f"{name}_text_document.{suffix}" for name in ("out", "alone"))
        assert ours.read_bytes() == alone.read_bytes()
    assert "nothing to do" in preprocess(source, tmp_path / "out", *options).err


@pytest.mark.parametrize(("tasks", "at_a_time", "workers"), [(64, 8, 1), (3, 3, 2), (1, 1, 8)])
def test_datatroves_local_tasks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, tasks: int, at_a_time: int, workers: int
) -> None:
    made: list[dict[str, Any]] = []

    def new(**given: Any) -> SimpleNamespace:
        made.append(given)
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(executors, "_executor", lambda _: new)
    settings = PreprocessingSettings(("in.jsonl",), "out", "model", dedup="near", workers=8)
    executors.run_with_datatrove(settings, "local", tasks, "logs", {})
    shares = [(each["tasks"], each["workers"], each["pipeline"][0].settings) for each in made]
    expected = [(tasks, at_a_time, workers), (1, 1, 8), (tasks, at_a_time, workers)]
    assert [(count, at_once, own.workers) for count, at_once, own in shares] == expected


def test_datatrove_has_no_standard_input(tmp_path: Path) -> None:
    given = ("--input", "-", "--output-prefix", tmp_path / "out", "--tokenizer-model", MODEL)
    result = run_tool("preprocess_with_datatrove", *given, "--logging-dir", tmp_path / "logs")
    assert result.code == 2 and "--input -" in result.err
