"""Killed at any moment and run again: the files are those of an undisturbed run, and at no moment
is there one that is neither absent nor whole."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from corpus import left_behind, texts, write_jsonl

KILLS = 30
STEP = 11  # every so many-th change of a directory, from another first one in every test run
Files = dict[str, bytes]


def files_in(directory: Path) -> Files:
    return {path: (directory / path).read_bytes() for path in left_behind(directory)}


def is_final(path: str) -> bool:
    """A name under which something is read: of datasets and shards."""
    return path.endswith((".bin", ".idx", "manifest.json")) and "duplicates" not in path


class Runs:
    """inputs in two files; merged: what an undisturbed run leaves; whole: its shards as well."""

    def __init__(self, directory: Path) -> None:
        script = Path(__file__).with_name("forked_runs.py")
        paths = os.pathsep.join([str(script.parent), str(script.parents[1])])
        self.forking = subprocess.Popen(
            [sys.executable, script],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
        )
        found = texts()
        self.inputs = [
            write_jsonl(directory / "one.jsonl", found * 2),
            write_jsonl(directory / "two.jsonl", found),
        ]
        self.options = ["--append-eod", "--shard-size", "64K", "--dedup", "exact"]
        for name, more in {"merged": [], "shards": ["--no-merge"]}.items():
            (directory / name).mkdir()
            assert self.run(directory / name, [*self.options, *more]) == 0
        self.merged = files_in(directory / "merged")
        shards = files_in(directory / "shards")
        self.whole = {path: shards[path] for path in shards if "_shards" in path} | self.merged
        assert {path.rpartition(".")[2] for path in self.merged} == {"bin", "idx", "json"}

    def run(
        self,
        directory: Path,
        options: list[str],
        kill_after: float | None = None,
        crash_at: int | None = None,
    ) -> int:
        """The exit code of a run in a process of its own.  kill_after: seconds."""
        assert self.forking.stdin is not None and self.forking.stdout is not None
        job = {"inputs": list(map(str, self.inputs)), "prefix": str(directory / "out")}
        line = json.dumps(job | {"options": options, "crash_at": crash_at}) + "\n"
        self.forking.stdin.write(line.encode())
        pid = int(self.forking.stdout.readline())
        if kill_after is not None:
            ended, _, _ = select.select([self.forking.stdout], [], [], kill_after)
            if not ended:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return int(self.forking.stdout.readline())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.forking.kill()
    made.forking.wait()


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
    (tmp_path / "timed").mkdir()
    runs.run(tmp_path / "timed", runs.options)
    seconds = time.perf_counter() - clock
    kills = finished = 0
    ended: int | None = None
    while kills < KILLS or ended != 0:
        directory = tmp_path / f"run{finished}"
        directory.mkdir(exist_ok=True)
        kill_after = rng.uniform(0, seconds) if kills < KILLS else None
        ended = runs.run(directory, runs.options, kill_after)
        for path, content in files_in(directory).items():
            assert not is_final(path) or content == runs.whole[path], path
        if ended == -signal.SIGKILL:
            kills += 1
        else:
            assert ended == 0
            assert files_in(directory) == runs.merged
            finished += 1


def test_killed_before_every_change_of_a_directory(runs: Runs, tmp_path: Path) -> None:
    """Also while an older dataset is replaced."""
    number, ended = random.randrange(1, STEP + 1), -signal.SIGKILL
    while ended != 0:
        directory = tmp_path / str(number)
        directory.mkdir()
        if number % 2:
            assert runs.run(directory, ["--shard-size", "200K"]) == 0
        before = files_in(directory)
        ended = runs.run(directory, runs.options, crash_at=number)
        assert ended in (0, -signal.SIGKILL)
        found = files_in(directory)
        for path, content in found.items():
            if is_final(path):
                assert content in (before.get(path), runs.whole.get(path)), f"{number}: {path}"
        pair = [f"out_text_document.{suffix}" for suffix in ("bin", "idx")]
        if pair[1] in found:  # and it is not one's index over the other's data
            assert any(
                all(found.get(path) == whole.get(path) for path in pair)
                for whole in (before, runs.merged)
            ), number
        if ended != 0:
            assert runs.run(directory, runs.options) == 0
        assert files_in(directory) == runs.merged, number
        number += STEP
