"""A threshold that follows the score distribution of past steps, for selection without ranking.

After each step the exact k-th score over all its tokens is found (four small all-reduces, no extra
forward) and averaged into the threshold that the next step compares with.  How many tokens a step
selects is then no longer exact, but which of them does not depend on how it is cut into
micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.selection.top_fraction import Placement, Selection

# Of the running average: a step counts for a fifth.  One step's threshold alone would be noisy, and
# an average over many would lag behind a policy that learns.
DECAY = 0.8


@dataclass
class CarriedThreshold:
    """thresholds as of the end of `iteration`, one for each set; None before the first step.

    A step may be repeated (Megatron's rerun machinery does so to tell a hardware fault from a bug),
    so what a step finds replaces the state only when a later one asks.
    """

    thresholds: tuple[float, ...] | None = None
    iteration: int = -1
    found: tuple[float, ...] | None = None
    found_in: int = -1

    def before(self, iteration: int) -> tuple[float, ...] | None:
        """The thresholds that `iteration` compares with."""
        if self.found is not None and self.found_in < iteration:
            self.thresholds, self.iteration, self.found = self.found, self.found_in, None
        return self.thresholds

    def after(self, iteration: int, exact: list[float], has_tokens: list[bool]) -> None:
        """Take in the exact thresholds of a step; a set without tokens keeps what it has.  There
        are none until a step had tokens of all sets."""
        old = self.thresholds
        if old is None:
            self.found = tuple(exact) if all(has_tokens) else None
        else:
            self.found = tuple(
                DECAY * was + (1.0 - DECAY) * new if any_token else was
                for was, new, any_token in zip(old, exact, has_tokens, strict=True)
            )
        self.found_in = iteration

    def state(self) -> tuple[int, tuple[float, ...]] | None:
        """What a checkpoint at the end of the last step has to keep."""
        if self.found is not None:
            return self.found_in, self.found
        return None if self.thresholds is None else (self.iteration, self.thresholds)

    @staticmethod
    def from_state(state: tuple[int, tuple[float, ...]] | None) -> CarriedThreshold:
        """The inverse of state()."""
        if state is None:
            return CarriedThreshold()
        return CarriedThreshold(thresholds=tuple(state[1]), iteration=state[0])


def select_above(
    scores: Tensor, valid: Tensor, thresholds: Tensor, sets: Tensor, placement: Placement
) -> Selection:
    """Select the valid tokens that score at least the threshold of their set.

    Args:
        scores: float32 [b, s], valid: bool [b, s], sets: int64 [b], thresholds: float32 [sets].
    """
    selected = valid & (scores >= thresholds[sets][:, None])
    counts = torch.zeros(2, len(thresholds), dtype=torch.int64, device=scores.device)
    counts[0].index_add_(0, sets, valid.sum(1))
    counts[1].index_add_(0, sets, selected.sum(1))
    if placement.shared:
        torch.distributed.all_reduce(counts, group=placement.group)
    return Selection(selected, thresholds, counts[0], counts[1])
