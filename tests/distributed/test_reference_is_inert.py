"""The reference learns nothing, draws nothing and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs import Checkpoints, Corpus
from launch import pretrain


def test_reference_is_inert(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    arguments = [
        *corpus.arguments,
        *untied.arguments,
        *["--train-iters", "3", "--micro-batch-size", "3", "--slm-token-ratio", "0.6"],
        *["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
    ]
    pretrain(2, arguments, tmp_path, module="watched_pretrain")
    for rank in range(2):
        seen = torch.load(tmp_path / f"watched{rank}.pt")
        assert seen["parameters"] > 0
        assert seen["requiring gradient"] == 0
        assert seen["with gradient"] == 0
        assert not seen["training mode"]
        # Compared around the build and around every score.
        assert seen["generators moved by build"] == []
        assert seen["generators moved by score"] == []
        assert seen["scores"] == 3 + 1  # steps and a validation
        assert seen["weights before"] == seen["weights after"]
        assert seen["optimizer numbers"] == seen["policy numbers"]
