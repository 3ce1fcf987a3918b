"""NaN ends a run with one line, and the last checkpoint is one from before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Checkpoints, Corpus
from launch import Run, pretrain
from random_llama import small_llama, write_random_llama

TRACKER = "latest_checkpointed_iteration.txt"
LARGE = "--lr 1e18"  # weights of the first step are finite; in the next attention overflows
REFERENCE = "--slm-reference-load REFERENCE --slm-token-ratio 0.6"
SAVE = "--save saved --save-interval"
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"
LOSS = "in the loss of micro-batch 0; no checkpoint has been written"
WEIGHTS = "the policy's weights are NaN or infinite; no checkpoint has been written"

CASES = {
    # ranks, arguments, the line
    "in a later step": (
        2,
        f"{LARGE} {REFERENCE} {SAVE} 10 --train-iters 3",
        f"iteration 2, rank 0 and 1 more: found NaN {LOSS}",
    ),
    "in a later step, by stages": (
        # Each has found its own NaN again: the last compares losses that the schedule has freed.
        2,
        f"{LARGE} --pipeline-model-parallel-size 2 --train-iters 3",
        "iteration 2, rank 0 and 1 more: found NaN in local grad norm for bucket #0 in backward "
        "pass before data-parallel communication collective; no checkpoint has been written",
    ),
    "in a later step, not repeated": (
        1,
        f"{LARGE} --rerun-mode disabled --train-iters 3",
        f"iteration 2, rank 0: found NaN {LOSS}",
    ),
    "in validation": (
        1,
        f"{LARGE} {REFERENCE} --train-iters 1",
        f"validation after iteration 1, rank 0: found NaN {LOSS}",
    ),
    "at the checkpoint": (
        1,
        f"{LARGE} {SAVE} 2 {UNCHECKED} --train-iters 3",
        f"the checkpoint of iteration 2, rank 0: {WEIGHTS}",
    ),
}


def ends_with(run: Run, line: str) -> None:
    for output, code in zip(run.outputs, run.codes, strict=True):
        assert code == 2, output[-3000:]
        assert "Traceback" not in output
    said = "\n".join(run.outputs).splitlines()
    assert {one for one in said if one.startswith("error: ")} == {f"error: {line}"}


@pytest.mark.parametrize("case", CASES)
def test_weights_that_overflow(
    case: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    ranks, flags, line = CASES[case]
    arguments = [
        *corpus.arguments,
        *untied.without_reference,
        *"--micro-batch-size 3 --clip-grad 0".split(),
        *flags.replace("REFERENCE", str(untied.reference)).split(),
    ]
    ends_with(pretrain(ranks, arguments, tmp_path, check=False), line)
    assert not (tmp_path / "saved" / TRACKER).exists()


def test_first_step_of_a_resumed_run(corpus: Corpus, tmp_path: Path) -> None:
    """In which Megatron does not look; and the checkpoint that it went on from stays the last."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    broken = write_random_llama(tmp_path, small_llama(VOCABULARY, SEQUENCE), torch.float32, spoil)
    arguments = [
        *corpus.arguments,
        *f"--load {broken} --use-checkpoint-args --no-load-optim --no-load-rng".split(),
        *f"--global-batch-size {GLOBAL_BATCH} --micro-batch-size 3 --lr 1e-3".split(),
        *f"--train-iters 2 --eval-iters 0 --eval-interval 9 --save {broken}".split(),
        *"--save-interval 1".split(),
    ]
    before = (broken / TRACKER).read_text()
    run = pretrain(1, arguments, tmp_path / "run", check=False)
    kept = f"the last checkpoint, written before, is {before} (by {broken / TRACKER})"
    ends_with(run, f"iteration 1, rank 0: found NaN in the loss of micro-batch 0; {kept}")
    assert (broken / TRACKER).read_text() == before
