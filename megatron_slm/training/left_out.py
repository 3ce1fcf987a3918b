"""Leave training tokens out of the loss, whatever they score: by a hash, a mask, or their values.

A token that is left out is as a masked one: it is not ranked, and counts nowhere.  Validation goes
over all tokens, as in every Megatron run.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.selection import kept_by_goldfish


@dataclass(frozen=True)
class LeftOut:
    """Which training tokens are left out."""

    goldfish: tuple[int, int] | None = None
    """k and h of a goldfish mask (selection/goldfish.py)."""
    masked: bool = False
    """Whether samples have a mask: 0 for tokens that are left out."""
    above: float | None = None
    """Tokens with a higher external value are left out."""
    below: float | None = None
    """Tokens with a lower external value are left out."""

    def __bool__(self) -> bool:
        return self != LeftOut()

    def applied(
        self, batch: dict[str, Tensor], sample: dict[str, Any], places: Tensor | None
    ) -> Tensor:
        """Return the loss mask, float32 [b, s], with 0 for the tokens that are left out.

        Args:
            batch: the tokens, labels and loss mask of whole samples, [b, s].
            sample: what the loader yielded, with `mask` and `external`, float32 [b, s], as needed.
            places: the position of each token in its document, int64 [b, s]; None if documents see
                each other.
        """
        loss_mask = batch["loss_mask"]

        def of_sample(name: str) -> Tensor:
            values: Tensor = sample[name]
            return values.to(loss_mask.device, non_blocking=True)

        if self.goldfish is not None:
            # In fine-tuning, the labels of prompts are no ids.
            ids = torch.cat([batch["tokens"][:, 1:], batch["labels"][:, -1:]], dim=1)
            loss_mask = loss_mask * kept_by_goldfish(ids, *self.goldfish, places)
        if self.masked:
            loss_mask = loss_mask * (of_sample("mask") > 0)
        if self.above is not None:
            loss_mask = loss_mask * (of_sample("external") <= self.above)
        if self.below is not None:
            loss_mask = loss_mask * (of_sample("external") >= self.below)
        return loss_mask


def tokens_left_out(args: Namespace, kinds: Collection[str]) -> LeftOut:
    """Return which tokens the arguments leave out.

    Args:
        args: the arguments after Megatron's validation.
        kinds: the kinds of values that the run has.

    Raises:
        UserError: arguments contradict each other, or leave out all tokens.
    """
    found = dict(item.split("=") for item in args.slm_leave_out)
    if len(found) < len(args.slm_leave_out):
        raise UserError(f"--slm-leave-out {' '.join(args.slm_leave_out)} names one way twice")
    limits = {side: float(found[side]) for side in ("above", "below") if side in found}
    if limits and "external" not in kinds:
        raise UserError("--slm-leave-out needs --slm-token-values with a cache of external values")
    if limits.get("below", -math.inf) > limits.get("above", math.inf):
        raise UserError(f"--slm-leave-out {' '.join(args.slm_leave_out)} leaves out all tokens")
    goldfish = None
    if "goldfish" in found:
        one_in, _, width = found["goldfish"].partition(":")
        goldfish = int(one_in), int(width)
        if goldfish[1] > args.seq_length:
            raise UserError(
                f"--slm-leave-out goldfish={found['goldfish']}: {width} tokens are more than "
                f"--seq-length {args.seq_length}"
            )
    return LeftOut(goldfish, "mask" in kinds, limits.get("above"), limits.get("below"))
