"""Killed at any moment and run again: the files are those of an undisturbed run, and at no moment
is there one that is neither absent nor whole."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from corpus import left_behind, texts, write_jsonl
from launch import PYTHONPATH, SUPPORT

KILLS = 30
STEP = 11  # every so many-th change of a directory, from another first one in every test run
OPTIONS = ["--append-eod", "--shard-size", "64K", "--dedup", "exact"]
TWO_KEYS = ("--json-keys", "text", "title")
Files = dict[str, bytes]
Kind = tuple[tuple[str, ...], str]  # of datasets: options that decide on their files
KINDS: list[Kind] = [((), "--merge"), (TWO_KEYS, "--merge"), ((), "--no-merge")]


def files_in(directory: Path) -> Files:
    """By name; lists of paths without the directory, to be compared with those elsewhere."""
    found = {path: (directory / path).read_bytes() for path in left_behind(directory)}
    return {path: found[path].replace(f"{directory}/".encode(), b"") for path in found}


def is_final(path: str) -> bool:
    """Tell whether a path is a final name, under which a dataset or shard is read."""
    return path.endswith((".bin", ".idx", "manifest.json")) and "duplicates" not in path


class Runs:
    """inputs in two files; final: what an undisturbed run leaves; whole: its shards as well."""

    def __init__(self, directory: Path) -> None:
        script = SUPPORT / "forked_runs.py"
        self.forking = subprocess.Popen(
            [sys.executable, script],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )
        found = texts()
        self.inputs = [
            write_jsonl(directory / "one.jsonl", found * 2, title="A title"),
            write_jsonl(directory / "two.jsonl", found, title="A title"),
        ]
        self.final: dict[Kind, Files] = {}
        for at, (keys, merge) in enumerate([*KINDS, (TWO_KEYS, "--no-merge")]):
            (directory / str(at)).mkdir()
            assert self.run(directory / str(at), [*OPTIONS, *keys, merge]) == 0
            self.final[keys, merge] = files_in(directory / str(at))
        self.whole: dict[Kind, Files] = {}
        for keys, merge in KINDS:
            unmerged = self.final[keys, "--no-merge"]
            shards = {path: unmerged[path] for path in unmerged if "_shards" in path}
            self.whole[keys, merge] = shards | self.final[keys, merge]
        self.merged = self.final[KINDS[0]]
        assert {path.rpartition(".")[2] for path in self.merged} == {"bin", "idx", "json"}

    def run(
        self,
        directory: Path,
        options: Sequence[str],
        kill_after: float | None = None,
        one_worker: bool = False,
        crash_at: int | None = None,
        inputs: int = 2,
    ) -> int:
        """Run preprocessing in a process of its own, and return its exit code.

        Args:
            kill_after: seconds.
            one_worker: is killed, if there is one by then, instead of all processes.
            inputs: how many, from the first.
        """
        assert self.forking.stdin is not None and self.forking.stdout is not None
        job = {"inputs": list(map(str, self.inputs[:inputs])), "prefix": str(directory / "out")}
        line = json.dumps(job | {"options": options, "crash_at": crash_at}) + "\n"
        self.forking.stdin.write(line.encode())
        pid = int(self.forking.stdout.readline())
        if kill_after is not None:
            ended, _, _ = select.select([self.forking.stdout], [], [], kill_after)
            if not ended:
                workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                with suppress(ProcessLookupError):
                    if one_worker and workers:
                        os.kill(int(workers[-1]), signal.SIGKILL)
                    else:
                        os.killpg(pid, signal.SIGKILL)
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
    """KILLS times in all, in as many runs as it takes to end each of them, of all kinds of datasets
    in turn, by one worker or two."""
    clock = time.perf_counter()
    (tmp_path / "timed").mkdir()
    runs.run(tmp_path / "timed", [*OPTIONS, *TWO_KEYS, "--workers", "2"])  # the longest
    seconds = time.perf_counter() - clock
    kills = finished = 0
    ended: int | None = None
    while kills < KILLS or ended != 0:
        directory = tmp_path / f"run{finished}"
        directory.mkdir(exist_ok=True)
        kind = KINDS[finished % len(KINDS)]
        options = [*OPTIONS, *kind[0], kind[1], "--workers", "1" if finished % 4 == 0 else "2"]
        kill_after = rng.uniform(0, seconds) if kills < KILLS else None
        one_worker = rng.random() < 0.3
        ended = runs.run(directory, options, kill_after, one_worker)
        for path, content in files_in(directory).items():
            assert not is_final(path) or content == runs.whole[kind][path], path
        if ended == 0:
            assert files_in(directory) == runs.final[kind]
            finished += 1
        else:
            assert ended == -signal.SIGKILL or (ended == 2 and one_worker)
            kills += 1


def test_killed_before_every_change_of_a_directory(runs: Runs, tmp_path: Path) -> None:
    """Also while an older dataset is replaced."""
    number, ended = random.randrange(1, STEP + 1), -signal.SIGKILL
    while ended != 0:
        directory = tmp_path / str(number)
        directory.mkdir()
        if number % 2:
            assert runs.run(directory, ["--shard-size", "200K"]) == 0
        before = files_in(directory)
        ended = runs.run(directory, OPTIONS, crash_at=number)
        assert ended in (0, -signal.SIGKILL)
        found = files_in(directory)
        for path, content in found.items():
            if is_final(path):
                whole = runs.whole[KINDS[0]].get(path)
                assert content in (before.get(path), whole), f"{number}: {path}"
        pair = [f"out_text_document.{suffix}" for suffix in ("bin", "idx")]
        if pair[1] in found:  # and it is not one's index over the other's data
            assert any(
                all(found.get(path) == whole.get(path) for path in pair)
                for whole in (before, runs.merged)
            ), number
        if ended != 0:
            assert runs.run(directory, OPTIONS) == 0
        assert files_in(directory) == runs.merged, number
        number += STEP


def test_more_input_after_a_kill(runs: Runs, tmp_path: Path) -> None:
    """It does not rely on what the killed run had removed, or had not made yet."""
    number, ended = random.randrange(1, STEP + 1), -signal.SIGKILL
    while ended != 0:
        directory = tmp_path / str(number)
        directory.mkdir()
        ended = runs.run(directory, OPTIONS, crash_at=number, inputs=1)
        assert ended in (0, -signal.SIGKILL)
        assert runs.run(directory, OPTIONS) == 0, number
        assert files_in(directory) == runs.merged, number
        number += STEP


@contextmanager
def spoiled(path: Path) -> Iterator[None]:
    """With other words in it, which its size and time do not show."""
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"the", b"eht"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    yield
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_shards_that_are_in_the_dataset_alone_are_used_again(runs: Runs, tmp_path: Path) -> None:
    """To make one of the spoiled input again would show."""
    options = ["--shard-size", "200K", *TWO_KEYS]
    for name, inputs in {"old": 1, "new": 2}.items():
        (tmp_path / name).mkdir()
        assert runs.run(tmp_path / name, options, inputs=inputs) == 0
    number, ended = random.randrange(1, STEP // 3 + 1), -signal.SIGKILL
    while ended != 0:
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", directory)
        ended = runs.run(directory, options, crash_at=number)
        assert ended in (0, -signal.SIGKILL)
        if ended != 0:
            with spoiled(runs.inputs[0]):
                assert runs.run(directory, options) == 0
        assert files_in(directory) == files_in(tmp_path / "new"), number
        number += STEP // 3
