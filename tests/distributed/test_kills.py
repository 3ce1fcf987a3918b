"""Jobs killed at random moments, also while they write, come to the end of those that were not.

Kills reach the ranks alone: processes that they started have to end with them.  SLM_KILLS says how
many there are of each kind of job.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from forked_jobs import Server
from jobs import GLOBAL_BATCH, Checkpoints, Corpus
from megatron_slm.model.torch_dist import TorchDistReader

KILLS = int(os.getenv("SLM_KILLS", "30"))
PATIENCE = 60.0  # seconds, before something counts as hanging


def kill_again_and_again(
    server: Server,
    tool: str,
    ranks: int,
    arguments: list[str],
    directory: Path,
    to: Path,
    pattern: str,
    most: int,
    all_of_them: int,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Kill a job KILLS times, each time when it has written some files more.

    Args:
        to: where it writes. What it has written there is removed when it was faster than the kills
            and is at its end.
        pattern: of the files that it writes.
        most: that it writes until it is killed.
        all_of_them: that it writes if it is not killed.
        check: called after each kill.
    """
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    number = 0

    def written() -> int:
        return len(list(to.glob(pattern)))

    while number < KILLS:
        pids = server.start(tool, ranks, arguments, directory)
        wanted = written() + draw.randint(0, most)
        deadline = time.monotonic() + PATIENCE
        while written() < wanted and not server.has_ended():
            assert time.monotonic() < deadline, (directory / "rank0.log").read_text()[-3000:]
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.1))  # a save takes about as long, or a shard
        sign = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)[number % 3]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        codes = server.codes()  # the others may notice that the first is gone before they are
        wait_until_none_is_left(pids[0])
        if 0 in codes:
            assert written() == all_of_them
            shutil.rmtree(to)
            to.mkdir()
            continue
        assert codes[0] == -sign, (directory / "rank0.log").read_text()[-3000:]
        check()
        number += 1


def wait_until_none_is_left(group: int) -> None:
    """Wait for the end of all processes of a group."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a process that the job started outlives it")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's."""
    reader = TorchDistReader(directory)
    return {
        key: reader.read(key, (0,) * len(stored.size), tuple(stored.size))
        for key, stored in reader.table.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
AVERAGE = "--slm-reference ema:0.9 --slm-token-ratio 0.6"
KINDS = {
    "plain": "--use-distributed-optimizer",
    "async": ASYNC,
    "moving average": AVERAGE,
}


@pytest.mark.parametrize("kind", ["plain", "async", "moving average"])
def test_training(
    kind: str, corpus: Corpus, untied: Checkpoints, server: Server, tmp_path: Path
) -> None:
    """Weights, optimizer and average at the end, bit for bit."""
    ranks, steps = 2, 4 * KILLS + 4  # more than are made until the last kill
    options = f"--train-iters {steps} --micro-batch-size 3 --global-batch-size {GLOBAL_BATCH // 2}"
    options += f" --num-workers 1 --eval-iters 0 {KINDS[kind]}"
    model = untied.without_reference[: untied.without_reference.index("--load")]
    start = ["--pretrained-checkpoint", str(untied.policy)]
    arguments = [*corpus.arguments, *model, *start, *options.split()]
    whole, saved = tmp_path / "whole", tmp_path / "saved"
    saved.mkdir()
    again = [*arguments, "--load", str(saved), "--save", str(saved), "--save-interval", "1"]
    kill_again_and_again(
        server,
        "train",
        ranks,
        again,
        tmp_path / "killed",
        saved,
        "iter_*",  # directories, made when a save begins
        most=2,
        all_of_them=steps,
    )
    tracker = saved / "latest_checkpointed_iteration.txt"
    end = min(steps, 2 + (int(tracker.read_text()) if tracker.exists() else 0))
    server.run("train", ranks, [*again, "--exit-interval", str(end)], tmp_path / "killed")
    once = ["--save", str(whole), "--save-interval", str(end), "--exit-interval", str(end)]
    server.run("train", ranks, [*arguments, *once], tmp_path / "job")
    last = f"iter_{end:07d}"
    for each in [last] + [f"ema/{last}"] * ("average" in kind):
        expected, found = tensors(whole / each), tensors(saved / each)
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), key


def contents(cache: Path) -> dict[str, str]:
    """Hashes of what can be read as good: all but what a kill left under another name."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".partial"
    }


def test_scoring(corpus: Corpus, untied: Checkpoints, server: Server, tmp_path: Path) -> None:
    """Every file, which at any moment is whole or not there.  --exit-signal-handler is for runs
    that have something to save."""
    arguments = [
        *corpus.arguments,
        *f"--train-iters {3 * KILLS} --global-batch-size 2 --eval-iters 1".split(),
        *"--eval-interval 1000 --micro-batch-size 1 --num-workers 1 --shard-samples 1".split(),
        *f"--exit-signal-handler --slm-reference-load {untied.reference}".split(),
    ]
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    to = "--slm-reference-cache"
    server.run("score", 2, [*arguments, to, str(whole)], tmp_path / "job")
    again = [*arguments, to, str(cache)]
    kill_again_and_again(
        server,
        "score",
        2,
        again,
        tmp_path / "killed",
        cache,
        "*/*.losses",
        most=3,
        all_of_them=len(list(whole.glob("*/*.losses"))),
        check=lambda: same(contents(cache), contents(whole)),
    )
    server.run("score", 2, again, tmp_path / "killed")
    assert contents(cache) == contents(whole)


def same(part: dict[str, str], whole: dict[str, str]) -> None:
    assert part == {name: whole[name] for name in part}
