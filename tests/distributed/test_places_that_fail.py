"""Where a checkpoint cannot be written: one line on each rank says what, why and what is kept."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributed.test_kills import ASYNC, AVERAGE

from forked_jobs import Server
from jobs import GLOBAL_BATCH, Checkpoints, Corpus
from megatron_slm.model.torch_dist import TRACKER
from small_disk import small_disk

RANKS, STEPS = 2, 4
OF = "the checkpoint of iteration 2 cannot be written to"


def arguments(corpus: Corpus, start: Checkpoints, save: Path, extra: str) -> list[str]:
    model = start.without_reference[: start.without_reference.index("--load")]
    options = f"--train-iters {STEPS} --micro-batch-size 3 --global-batch-size {GLOBAL_BATCH // 2}"
    options += f" --num-workers 0 --eval-iters 0 --save-interval 1 {extra}"
    return [*corpus.arguments, *model, *options.split(), "--load", str(save), "--save", str(save)]


def errors(server: Server, command: list[str], directory: Path) -> list[str]:
    """Run a job that fails and return the line in which each rank says why."""
    server.start("train", RANKS, command, directory)
    codes = server.codes()
    outputs = [(directory / f"rank{rank}.log").read_text() for rank in range(RANKS)]
    assert codes == [2] * RANKS, outputs[0][-3000:]
    assert not any("Traceback" in output for output in outputs)
    return [output.splitlines()[-1] for output in outputs]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "5M") as directory:
        yield directory


@pytest.mark.parametrize(("extra", "room"), [("", 5), (ASYNC, 5), (AVERAGE, 7)])
def test_a_disk_that_is_full(
    extra: str,
    room: int,
    corpus: Corpus,
    untied: Checkpoints,
    server: Server,
    disk: Path,
    tmp_path: Path,
) -> None:
    """When there is room again the same command goes on."""
    save = disk / "saved"
    subprocess.run(["mount", "-o", f"remount,size={room}M", disk], check=True)
    command = arguments(corpus, untied, save, extra)
    first, second = errors(server, command, tmp_path / "job")
    assert f"cannot be written to {save}: " in first and f"{save}: another rank" in second
    assert "No space left on device; " in first
    if extra != ASYNC:  # in which case any of its files may be the first that does not fit
        file = rf"{re.escape(str(save))}/iter_0000002/__\1_\d\.distcp"
        assert re.search(rf": rank (\d): {file}: No space left on device; ", first), first
        assert first.endswith("the last good one is that of iteration 1")
        assert (save / TRACKER).read_text() == "1"
    subprocess.run(["mount", "-o", "remount,size=50M", disk], check=True)
    server.run("train", RANKS, command, tmp_path / "again")
    assert (save / TRACKER).read_text() == str(STEPS)


def a_file(save: Path) -> None:
    save.write_text("")


def in_a_file(save: Path) -> None:
    save.parent.rmdir()
    save.parent.write_text("")


def tracker_is_a_directory(save: Path) -> None:
    (save / TRACKER).mkdir(parents=True)


def iteration_is_a_file(save: Path) -> None:
    save.mkdir()
    (save / "iter_0000002").write_text("")


def iteration_is_a_link_to_nothing(save: Path) -> None:
    save.mkdir()
    (save / "iter_0000002").symlink_to("nowhere")


def average_is_a_file(save: Path) -> None:
    save.mkdir()
    (save / "ema").write_text("")


@pytest.mark.parametrize(
    ("put", "extra", "message"),
    [
        (a_file, "", "error: --save {} is not a directory"),
        (in_a_file, "", "error: --save {} cannot be written to: Not a directory"),
        (tracker_is_a_directory, ASYNC, f"error: --save {{}}: {TRACKER} is a directory"),
        (iteration_is_a_file, "", f"{OF} {{}}: {{}}/iter_0000002: File exists; the last good"),
        (iteration_is_a_link_to_nothing, ASYNC, f"{OF} {{}}: {{}}/iter_0000002: File exists; the"),
        (average_is_a_file, AVERAGE, "{}/ema/iter_0000001: Not a directory; there is none before"),
    ],
)
def test_something_else_in_its_place(
    put: Callable[[Path], None],
    extra: str,
    message: str,
    corpus: Corpus,
    untied: Checkpoints,
    server: Server,
    tmp_path: Path,
) -> None:
    save = tmp_path / "directory" / "saved"
    save.parent.mkdir()
    put(save)
    command = arguments(corpus, untied, save, extra)
    found = errors(server, command, tmp_path / "job")
    assert message.replace("{}", str(save)) in found[0]


def test_a_disk_that_may_only_be_read(
    corpus: Corpus, untied: Checkpoints, server: Server, disk: Path, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    command = arguments(corpus, untied, disk / "saved", "")
    for line in errors(server, command, tmp_path / "job"):
        assert line == f"error: --save {disk}/saved cannot be written to: Read-only file system"
