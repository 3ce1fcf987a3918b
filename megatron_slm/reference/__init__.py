"""Where reference losses come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Scored = tuple[Tensor, Tensor | None]
"""Losses of a micro-batch's tokens, and entropies if they are wanted: float32 [b, s/c], in nats."""


class Reference(Protocol):
    """A source of reference losses, and the moments of a run at which every rank calls it."""

    frozen: bool = True
    """Whether the same tokens have the same losses throughout a run."""

    def before_step(self, policy: Sequence[torch.nn.Module], iteration: int | None) -> None:
        """Learn from the policy's model chunks: runs right before a step, a validation step or a
        token dump, with the iteration, counted from 0, in the first case and None in the others."""
        return

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> list[Scored]:
        """Read `count` micro-batches (training/micro_batch.py) and return what each scores, on the
        last pipeline stage and an empty list on others, without changing them or anything else."""
        raise NotImplementedError

    def save(self, directory: str, iteration: int) -> None:
        """Write what resuming needs: runs right before the policy's checkpoint of `iteration` is
        written to `directory`."""
        return
