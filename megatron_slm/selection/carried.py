"""Select by a threshold that follows the scores of past steps, without ranking the current one.

After each step, the exact k-th score over all its tokens is found (by four small all-reduces, and
without another forward pass) and averaged into the threshold with which the next step compares.
The number of tokens that a step selects is then no longer exact, but which ones it selects does not
depend on how it is cut into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.selection.top_fraction import Placement, Selection

# The decay of the running average: a step counts for a fifth of it.  The threshold of a single step
# would be noisy, and an average over many steps would lag behind a policy that learns.
DECAY = 0.8


@dataclass
class CarriedThreshold:
    """The running average of the steps' thresholds, one for each set of tokens.

    Megatron may repeat a step to tell a hardware fault from a bug.  So what a step finds becomes
    the state only when a later step asks for it.
    """

    thresholds: tuple[float, ...] | None = None
    """The thresholds at the end of `iteration`; None before the first step."""
    iteration: int = -1
    """The step after which `thresholds` were found."""
    found: tuple[float, ...] | None = None
    """The thresholds at the end of `found_in`, which no later step has asked for."""
    found_in: int = -1
    """The step that may still be repeated."""

    def before(self, iteration: int) -> tuple[float, ...] | None:
        """Return the thresholds with which the step `iteration` compares."""
        if self.found is not None and self.found_in < iteration:
            self.thresholds, self.iteration, self.found = self.found, self.found_in, None
        return self.thresholds

    def after(self, iteration: int, exact: list[float], has_tokens: list[bool]) -> None:
        """Average the exact thresholds of a step into the state.

        A set of which the step had no tokens keeps its threshold.  The first state is that of the
        first step with tokens of all sets.

        Args:
            iteration: the step.
            exact: the lowest selected score of each set.
            has_tokens: whether the step had tokens of each set.
        """
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
        """Return what a checkpoint at the end of the last step has to keep."""
        if self.found is not None:
            return self.found_in, self.found
        return None if self.thresholds is None else (self.iteration, self.thresholds)

    @staticmethod
    def from_state(state: tuple[int, tuple[float, ...]] | None) -> CarriedThreshold:
        """Restore the thresholds from what `state` returned."""
        if state is None:
            return CarriedThreshold()
        return CarriedThreshold(thresholds=tuple(state[1]), iteration=state[0])


def select_above(
    scores: Tensor, valid: Tensor, thresholds: Tensor, sets: Tensor, placement: Placement
) -> Selection:
    """Select the valid tokens that score at least the threshold of their set.

    Args:
        scores: this rank's scores, float32 [b, s].
        valid: which tokens may be selected, bool [b, s].
        thresholds: the threshold of each set, float32 [sets].
        sets: the set of each sample, int64 [b].
        placement: how the samples lie over ranks.
    """
    selected = valid & (scores >= thresholds[sets][:, None])
    counts = torch.zeros(2, len(thresholds), dtype=torch.int64, device=scores.device)
    counts[0].index_add_(0, sets, valid.sum(1))
    counts[1].index_add_(0, sets, selected.sum(1))
    if placement.shared:
        torch.distributed.all_reduce(counts, group=placement.group)
    return Selection(selected, thresholds, counts[0], counts[1])
