"""Weigh tokens, once it is known which are selected.

    hard      1 for a selected token, 0 for others
    relu      in proportion to max(score, 0)
    softmax   in proportion to exp(score / temperature)

Soft weights (relu and softmax) go to all valid tokens of a set, and add up to the number that hard
selection would select, so that losses and gradients keep their scale.  To any of these, the guard
adds w * (selected / unselected) for every unselected token.  This adds w times the mean loss of the
unselected tokens to the mean loss of the selected ones, against the rise of the former that Rho-1
reports.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_slm.selection.top_fraction import Placement, Selection

Weighting = Literal["hard", "relu", "softmax"]
# A sum of positive scores up to this counts as 0, since nothing can be divided by it.
TINY = 1e-30
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def soft_weights(
    scores: Tensor,
    valid: Tensor,
    selection: Selection,
    weighting: Weighting,
    temperature: float,
    sets: Tensor,
    placement: Placement,
) -> Tensor:
    """Return soft weights, float32 [b, s], that add up to selection.count over each set.

    A set without a positive score gets the weights of hard selection in place of relu weights,
    since there is nothing for them to be in proportion to.

    Args:
        scores: this rank's scores, float32 [b, s].
        valid: which tokens may be selected, bool [b, s].
        selection: the tokens that hard selection selects.
        weighting: relu or softmax.
        temperature: of softmax.
        sets: the set of each sample, int64 [b], or of each token, int64 [b, s].
        placement: how the samples lie over ranks.
    """
    number_of_sets = len(selection.count)
    if weighting == "relu":
        raw = torch.where(valid, scores.clamp(min=0.0), 0.0)
    else:
        highest = scores.new_full((number_of_sets,), -torch.inf)
        masked = torch.where(valid, scores, -torch.inf)
        most = masked.amax(1) if sets.dim() == 1 else masked.flatten()
        highest.scatter_reduce_(0, sets.flatten(), most, "amax")
        if placement.shared:
            torch.distributed.all_reduce(highest, ReduceOp.MAX, group=placement.group)
        highest = torch.where(highest.isfinite(), highest, 0.0)
        raw = torch.exp((masked - _by_token(highest, sets)) / temperature)
    sums = raw.sum(1) if sets.dim() == 1 else raw.flatten()
    totals = scores.new_zeros(number_of_sets).index_add_(0, sets.flatten(), sums)
    if placement.shared:
        torch.distributed.all_reduce(totals, group=placement.group)
    factor = selection.count / totals.clamp(min=TINY)
    soft = raw * _by_token(factor, sets)
    return torch.where(_by_token(totals > TINY, sets), soft, selection.selected.float())


def guard_weights(valid: Tensor, selection: Selection, guard: float, sets: Tensor) -> Tensor:
    """Return what the guard adds for unselected tokens, float32 [b, s]; 0 for the others.

    Args:
        valid: which tokens may be selected, bool [b, s].
        selection: the tokens that are selected.
        guard: the weight w of the unselected tokens' mean loss.
        sets: the set of each sample, int64 [b], or of each token, int64 [b, s].
    """
    unselected = (selection.valid - selection.count).clamp(min=1)
    each = guard * selection.count / unselected
    return torch.where(valid & ~selection.selected, _by_token(each, sets), 0.0).float()


def _by_token(of_sets: Tensor, sets: Tensor) -> Tensor:
    """Return the values of the tokens' sets, [b, 1] for sets of samples, [b, s] for sets of
    tokens."""
    return of_sets[sets].view(len(sets), -1)
