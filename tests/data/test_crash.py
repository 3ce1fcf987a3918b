"""Killed at any moment and run again: the files are those of an undisturbed run, and at no moment
is there one that is neither absent nor whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import left_behind, preprocess, texts, write_jsonl

KILLS = 30
STEP = 11  # every so many-th change of a directory, from another first one in every test run
FORKING = multiprocessing.get_context("forkserver")


def run_quietly(inputs: list[Path], prefix: Path, options: list[str], crash_at: int | None) -> None:
    """In a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if crash_at is not None:
        crash_at_call(crash_at)
    preprocess(inputs, prefix, *options)


def crash_at_call(number: int) -> None:
    """End this process, as by kill -9, before the number-th change of a directory."""
    calls = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **named)

        return changed

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


class Runs:
    """inputs in two files; what an undisturbed run leaves, and what its shards are."""

    def __init__(self, directory: Path) -> None:
        found = texts()
        self.inputs = [
            write_jsonl(directory / "one.jsonl", found * 2),
            write_jsonl(directory / "two.jsonl", found),
        ]
        self.options = ["--append-eod", "--shard-size", "64K", "--dedup", "exact"]
        self.whole: dict[str, bytes] = {}
        self.seconds = 0.0
        for name, more in {"merged": [], "shards": ["--no-merge"]}.items():
            place = directory / name
            place.mkdir()
            self.start(place / "out", [*self.options, *more]).join()
            files = {path: (place / path).read_bytes() for path in left_behind(place)}
            assert any(path.endswith("out_text_document.manifest.json") for path in files)
            if name == "merged":
                self.merged = files
            self.whole |= {path: data for path, data in files.items() if "_shards" in path}
        self.whole |= self.merged

    def start(self, prefix: Path, options: list[str], crash_at: int | None = None) -> Any:
        process = FORKING.Process(target=run_quietly, args=(self.inputs, prefix, options, crash_at))
        process.start()
        return process

    def check_what_is_there(self, directory: Path) -> None:
        """Every file under its final name is whole: a dataset that opens is right."""
        for path in left_behind(directory):
            if path.endswith((".bin", ".idx", "manifest.json")) and "duplicates" not in path:
                assert (directory / path).read_bytes() == self.whole[path], path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    FORKING.set_forkserver_preload(["corpus", "megatron_slm.data.preprocess", "numpy"])
    return Runs(tmp_path_factory.mktemp("runs"))


def test_killed_at_random_moments(runs: Runs, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    try:
        kill_often(runs, tmp_path, random.Random(seed))
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def kill_often(runs: Runs, tmp_path: Path, rng: random.Random) -> None:
    """KILLS times in all, in as many runs as it takes to end each of them."""
    clock = time.perf_counter()
    runs.start(tmp_path / "timed", runs.options).join()
    seconds = time.perf_counter() - clock
    kills = finished = 0
    ended: int | None = None
    while kills < KILLS or ended != 0:
        directory = tmp_path / f"run{finished}"
        directory.mkdir(exist_ok=True)
        process = runs.start(directory / "out", runs.options)
        if kills < KILLS:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        ended = process.exitcode
        runs.check_what_is_there(directory)
        if ended == -signal.SIGKILL:
            kills += 1
        else:
            assert ended == 0
            assert {p: (directory / p).read_bytes() for p in left_behind(directory)} == runs.merged
            finished += 1


def test_killed_before_every_change_of_a_directory(runs: Runs, tmp_path: Path) -> None:
    """Including those while an older dataset is replaced."""
    old = ["--shard-size", "200K"]
    number, ended = random.randrange(1, STEP + 1), None
    while ended != 0:
        directory = tmp_path / str(number)
        directory.mkdir()
        if number % 2:
            runs.start(directory / "out", old).join()
            before = {p: (directory / p).read_bytes() for p in left_behind(directory)}
        else:
            before = {}
        process = runs.start(directory / "out", runs.options, crash_at=number)
        process.join()
        ended = process.exitcode
        for path in left_behind(directory):
            if path.endswith((".bin", ".idx", "manifest.json")) and "duplicates" not in path:
                assert (directory / path).read_bytes() in (
                    *([before[path]] if path in before else []),
                    *([runs.whole[path]] if path in runs.whole else []),
                ), path
        names = left_behind(directory)
        if "out_text_document.idx" in names:  # and not one's index over the other's data
            files = before, runs.merged
            assert any(
                all(
                    (directory / path).read_bytes() == whole.get(path)
                    for path in ("out_text_document.bin", "out_text_document.idx")
                )
                for whole in files
            )
        if ended != 0:
            runs.start(directory / "out", runs.options).join()
        assert {p: (directory / p).read_bytes() for p in left_behind(directory)} == runs.merged
        number += STEP
