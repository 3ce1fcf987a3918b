"""Score tokens with a reference: the protocol that all references follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Scored = tuple[Tensor, Tensor | None]
"""Losses of a micro-batch's tokens, and their entropies if wanted, float32 [b, s/c], in nats."""


class Reference(Protocol):
    """A source of reference losses, whose methods every rank calls at set moments of a run."""

    frozen: bool = True
    """Whether the same tokens get the same losses throughout a run."""

    def before_step(self, policy: Sequence[torch.nn.Module], iteration: int | None) -> None:
        """Learn from the policy.  Runs right before a step, a validation step or a token dump.

        Args:
            policy: the policy's model chunks.
            iteration: the step of training, counted from 0; None in the other cases.
        """
        return

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> list[Scored]:
        """Read micro-batches and score them, without changing them or the reference.

        Args:
            micro_batches: micro-batches, as training/micro_batch.py has them.
            count: how many to read.
            micro_batch_size: samples in each.

        Returns:
            The losses and entropies of each micro-batch, on the last pipeline stage; an empty list
            on the others.
        """
        raise NotImplementedError

    def save(self, directory: str, iteration: int) -> None:
        """Write what resuming needs.  Runs right before a checkpoint of the policy is written.

        Args:
            directory: where the policy's checkpoints are written.
            iteration: the checkpoint's iteration.
        """
        return
