"""Runs whose batches grow have samples to the end, and batches that fit."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from jobs import SEQUENCE, Checkpoints, Corpus
from launch import pretrain
from megatron_slm.errors import UserError
from megatron_slm.training.batch_schedule import check_batch_sizes, length_of_training

RUN = {
    "step_batch_size_schedule": "0:6 1K:12 2K:20",  # in tokens, of which a sample has 100
    "seq_length": 100,
    "train_iters": None,
    "train_samples": None,
    "micro_batch_size": 2,
    "data_parallel_size": 1,
    "rank": 0,
    "consumed_train_samples": 0,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "microbatch_group_size_per_vp_stage": None,
}


@pytest.mark.parametrize(
    ("asked", "iterations", "samples"),
    [
        ({"train_iters": 2}, 2, 6 + 6),
        ({"train_iters": 5}, 5, 6 + 6 + 12 + 20 + 20),
        ({"train_samples": 24}, 3, 6 + 6 + 12),
        ({"train_samples": 25}, 4, 6 + 6 + 12 + 20),
    ],
)
def test_length(asked: dict[str, int], iterations: int, samples: int) -> None:
    assert length_of_training(Namespace(**RUN | asked)) == (iterations, samples)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, None),
        ({"data_parallel_size": 2}, 6),
        ({"data_parallel_size": 2, "consumed_train_samples": 12}, None),
        ({"data_parallel_size": 3}, 20),
        ({"data_parallel_size": 3, "train_iters": 3}, None),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
            },
            6,
        ),
    ],
)
def test_sizes(changed: dict[str, int], refused: int | None) -> None:
    args = Namespace(**RUN | {"train_iters": 5} | changed)
    if refused is None:
        check_batch_sizes(args)
        return
    with pytest.raises(UserError, match=f"a batch of {refused} samples is not a multiple of [46]"):
        check_batch_sizes(args)


def test_samples_do_not_run_out(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """A blend has no more samples than it was asked for."""
    arguments = [*corpus.arguments, *untied.arguments, "--slm-token-ratio", "0.6"]
    at = arguments.index("--data-path")
    arguments[at + 1 : at + 2] = ["0.5", str(corpus.prefix), "0.5", str(corpus.prefix)]
    at = arguments.index("--global-batch-size")
    arguments[at : at + 2] = ["--step-batch-size-schedule", f"0:3 {6 * SEQUENCE}:12"]
    arguments += "--micro-batch-size 3 --train-iters 5 --slm-scope global-batch".split()
    arguments += "--slm-global-batch exact --slm-dump-interval 2 --slm-dump-dir dump".split()
    run = pretrain(1, arguments, tmp_path)
    assert list(run.scalars("batch-size").values()) == [3, 3, 12, 12, 12]
    assert len(list((tmp_path / "dump").glob("*.safetensors"))) == 4


def test_a_batch_that_ranks_do_not_share_can_be_decreased(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """As when a run goes on with fewer data-parallel ranks than it had."""
    arguments = [*corpus.arguments, *untied.arguments, "--slm-token-ratio", "0.6"]
    arguments += "--micro-batch-size 2 --train-iters 3".split()
    at = arguments.index("--global-batch-size") + 1
    decreased = "--decrease-batch-size-if-needed --eval-global-batch-size 8"
    losses = []
    for batch, extra in (("11", decreased), ("8", "")):
        arguments[at] = batch
        run = pretrain(2, [*arguments, *extra.split()], tmp_path / batch)
        losses.append(run.scalars("lm loss"))
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
