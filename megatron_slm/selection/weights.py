"""Weigh tokens, once it is known which are selected.

Each weight is a function of tokens (functions.py), and its docstring says where it comes from.
relu and softmax are for all valid tokens, the others for the selected ones: with a token selection
ratio of 1 all of them.  Losses are divided by the number of selected tokens, so that weights whose
mean over these is 1 keep the loss's scale.

To any of these, the guard adds w * (selected / unselected) for every unselected token.  This adds w
times the mean loss of the unselected tokens to the mean loss of the selected ones, against the rise
of the former that Rho-1 reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_slm.selection.functions import TokenFunction, token_weight
from megatron_slm.selection.tokens import Tokens
from megatron_slm.selection.top_fraction import Placement, Selection

# A sum of weights up to this counts as 0, since nothing can be divided by it.
TINY = 1e-30


@dataclass(frozen=True)
class Chosen:
    """The tokens that were selected, and the sets in which they competed."""

    selection: Selection
    """The tokens that are selected."""
    where: Tensor
    """The tokens that are weighed, bool [b, s/c]."""
    sets: Tensor
    """The set of each sample, int64 [b], or of each token, int64 [b, s/c]."""
    placement: Placement
    """How the samples lie over ranks."""

    def highest(self, values: Tensor) -> Tensor:
        """Return each token's highest value over its set, which can be subtracted from `values`.

        Collective over the ranks that share a set.  0 for a set without finite values.
        """
        sets = self.sets
        highest = values.new_full((len(self.selection.count),), -torch.inf)
        masked = torch.where(self.where, values, -torch.inf)
        most = masked.amax(1) if sets.dim() == 1 else masked.flatten()
        highest.scatter_reduce_(0, sets.flatten(), most, "amax")
        if self.placement.shared:
            torch.distributed.all_reduce(highest, ReduceOp.MAX, group=self.placement.group)
        return _by_token(torch.where(highest.isfinite(), highest, 0.0), sets)

    def normalized(self, values: Tensor) -> Tensor:
        """Scale values, 0 or more, so that they add up to the number selected in each set.

        Collective over the ranks that share a set.  A set without a positive value gets 1 for its
        selected tokens, since there is nothing for weights to be in proportion to.
        """
        sets, count = self.sets, self.selection.count
        raw = torch.where(self.where, values, 0.0)
        sums = raw.sum(1) if sets.dim() == 1 else raw.flatten()
        totals = values.new_zeros(len(count)).index_add_(0, sets.flatten(), sums)
        if self.placement.shared:
            torch.distributed.all_reduce(totals, group=self.placement.group)
        scaled = raw * _by_token(count / totals.clamp(min=TINY), sets)
        return torch.where(_by_token(totals > TINY, sets), scaled, self.selection.selected.float())


@token_weight(needs=("scores",), of_all=True)
def relu(tokens: Tokens, chosen: Chosen) -> Tensor:
    """Weigh all tokens in proportion to max(score, 0)."""
    return chosen.normalized(tokens.scores.clamp(min=0.0))


@token_weight(needs=("scores",), of_all=True)
def softmax(tokens: Tokens, chosen: Chosen, *, temperature: float = 1.0) -> Tensor:
    """Weigh all tokens in proportion to exp(score / temperature)."""
    scores = tokens.scores
    return chosen.normalized(torch.exp((scores - chosen.highest(scores)) / temperature))


@token_weight()
def dft(tokens: Tokens, _: Chosen) -> Tensor:
    """Weigh tokens by the policy's own probability, exp(-L_policy), not normalized.

    Dynamic fine-tuning (arXiv 2508.05629), whose loss is sg(p) * -log p.
    """
    return torch.exp(-tokens.losses)


@token_weight(needs=("entropies",))
def mile(tokens: Tokens, chosen: Chosen, *, gamma: float = 1.0) -> Tensor:
    """Weigh tokens by (1 + H_policy) ** gamma, divided by its mean.

    MiLe loss (Su et al., Findings of NAACL 2024; arXiv 2310.19531), as in the authors' code, whose
    sigma is 1 and whose mean is taken over the tokens of all ranks; here it is over a set.
    """
    return chosen.normalized((1.0 + tokens.entropies) ** gamma)


@token_weight(needs=("reference_losses",))
def longce(tokens: Tokens, _: Chosen, *, gamma: float = 5.0) -> Tensor:
    """Weigh tokens by min(exp(L_reference - L_policy), gamma), not normalized.

    LongCE (arXiv 2410.23771), for a reference that sees a short context alone.  The formula and the
    default are those of the authors' code, where the reference is the policy itself.
    """
    return torch.exp(tokens.reference_losses - tokens.losses).clamp(max=gamma)


@token_weight(needs=("reference_losses",))
def context(tokens: Tokens, chosen: Chosen, *, interpolation: float = 0.0) -> Tensor:
    """Weigh tokens by |L_policy - L_reference|, for a reference that sees a short context alone.

    The dense weights of Helm et al. (arXiv 2503.09202): normalized to a mean of 1 over each
    sequence (scope sequence), and mixed with weights of 1 as interpolation + (1 - interpolation) w.
    """
    far = chosen.normalized((tokens.losses - tokens.reference_losses).abs())
    return interpolation + (1.0 - interpolation) * far


WEIGHT_FUNCTIONS: dict[str, TokenFunction | None] = {
    "hard": None,  # 1 for each selected token, which needs no weights
    "relu": relu,
    "softmax": softmax,
    "dft": dft,
    "mile": mile,
    "longce": longce,
    "context": context,
}
WEIGHTINGS = tuple(WEIGHT_FUNCTIONS)
# Options outside of these would make weights negative, infinite or all 0: (above, up to).
OPTION_LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "softmax": {"temperature": (0.0, math.inf)},
    "longce": {"gamma": (0.0, math.inf)},
    "context": {"interpolation": (-TINY, 1.0)},
}


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
