"""Where reference losses come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Scored = tuple[Tensor, Tensor | None]
"""Losses of a micro-batch's tokens, and entropies if they are wanted: float32 [b, s/c], in nats."""


class Reference(Protocol):
    """Scores tokens beside the policy, on the same ranks.  Every rank calls each moment."""

    frozen: bool = True
    """Whether it scores the same tokens in the same way throughout a run."""

    def before_step(self, policy: Sequence[torch.nn.Module], iteration: int | None) -> None:
        """Run right before a step, or before a token dump, with the policy's model chunks: the
        moment to learn from them.  `iteration` counts from 0 and is None where nothing is trained.
        """

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> list[Scored]:
        """Read `count` micro-batches (training/micro_batch.py) and return what each scores, on the
        last pipeline stage, and nothing on the others; changes neither them nor itself.
        """
        raise NotImplementedError

    def save(self, directory: str, iteration: int) -> None:
        """Run right before the policy's checkpoint of `iteration` is written to `directory`: what
        resuming from that checkpoint needs has to be there first.
        """
