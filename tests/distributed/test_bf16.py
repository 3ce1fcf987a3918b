"""bf16 in every layout: no NaN, and the losses of float32 to bf16's precision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from distributed.test_layouts import LAYOUTS

from jobs import Checkpoints, Corpus
from launch import pretrain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16(layout: str, corpus: Corpus, tied: Checkpoints, tmp_path: Path) -> None:
    ranks, flags = LAYOUTS[layout]
    arguments = [
        *corpus.arguments,
        *tied.arguments,
        *f"--train-iters 3 --micro-batch-size 3 --slm-token-ratio 0.6 --bf16 {flags}".split(),
    ]
    run = pretrain(ranks, arguments, tmp_path)
    for tag in run.tags():
        assert all(math.isfinite(value) for value in run.scalars(tag).values()), tag
    losses = run.scalars("lm loss")
    assert losses[3] < losses[1]
