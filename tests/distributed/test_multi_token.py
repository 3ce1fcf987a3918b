"""Layers that predict more tokens: their losses count valid tokens, and weigh what they weigh in
Megatron's own causal language modeling, whatever the policy selects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forked_jobs import Server
from jobs import LLAMA, OPTIMIZER, POLICY, UNTIED, Checkpoints, Corpus
from launch import Run, pretrain

TAGS = ("lm loss", "grad-norm", "mtp_1 loss", "mtp_2 loss", "lm loss validation")
RANKED = "--slm-token-ratio 0.6 --slm-scope global-batch --slm-global-batch exact"


def test_predictions_of_more_tokens(
    server: Server, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """With a ratio of 1 a run is Megatron's to the bit; with another one, the layers' gradients are
    the same, which they get from these losses alone."""
    common = [
        *[*corpus.arguments, *POLICY, *LLAMA, *UNTIED, *OPTIMIZER],
        *"--mtp-num-layers 2 --train-iters 3 --micro-batch-size 3 --eval-interval 2".split(),
    ]
    passes = f"--slm-reference-load {untied.reference} --tensorboard-dir tensorboard"
    runs = {
        "full": f"{passes} --slm-token-ratio 1 --slm-head dense",
        "ranked": f"{passes} {RANKED} --pipeline-model-parallel-size 2",
    }
    for name, flags in runs.items():
        server.run("record experts", 2, [*common, *flags.split()], tmp_path / name)
    megatron = pretrain(2, common, tmp_path / "megatron", module="megatron_pretrain")
    full = Run(tmp_path / "full", [], [])
    for tag in TAGS:
        # A validation after the last step comes when the log may be closed.
        expected, found = (
            {step: value for step, value in run.scalars(tag).items() if step <= 3}
            for run in (megatron, full)
        )
        assert found == expected != {}
    first, ranked = (
        torch.load(tmp_path / name / "recorded/experts1.pt") for name in ("full", "ranked")
    )
    assert ranked["moved"] == [] and "policy" in ranked["passes"]
    expected, found = (seen["further"][0] for seen in (first, ranked))
    assert set(found) == set(expected) != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
        )
    lm_loss = [Run(tmp_path / name, [], []).scalars("lm loss")[2] for name in runs]
    assert lm_loss[0] != pytest.approx(lm_loss[1], rel=1e-5)
