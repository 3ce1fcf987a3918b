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
        raw = torch.where(self.where, values, 0.0)
        totals = self.totals(raw)
        scaled = raw * (_by_token(self.selection.count, self.sets) / totals.clamp(min=TINY))
        return torch.where(totals > TINY, scaled, self.selection.selected.float())

    def totals(self, values: Tensor, kinds: Tensor | None = None, number: int = 1) -> Tensor:
        """Return, for each token, the sum of `values` over its set.

        Collective over the ranks that share a set.

        Args:
            values: what to add up, [b, s/c]; 0 for tokens that are not weighed.
            kinds: what kind of token each is, int64 [b, s/c]; the sums are then over the set's
                tokens of the same kind.
            number: the number of kinds.
        """
        sets = self.sets
        if kinds is not None:
            sets = (sets if sets.dim() == 2 else sets[:, None]) * number + kinds
        sums = values.sum(1) if sets.dim() == 1 else values.flatten()
        totals = values.new_zeros(len(self.selection.count) * number)
        totals.index_add_(0, sets.flatten(), sums)
        if self.placement.shared:
            torch.distributed.all_reduce(totals, group=self.placement.group)
        return _by_token(totals, sets)

    def median_of_means(self, values: Tensor) -> Tensor:
        """Return, for each token, the median over its set of the mean value of each sequence.

        A sequence is a sample; if sets are documents, it is the document, whose mean is the median.
        Of an even number of sequences it is the lower one in the middle.  Collective over the ranks
        that share a set.
        """
        raw, weighed = torch.where(self.where, values, 0.0), self.where.to(values.dtype)
        if self.sets.dim() == 2:
            return self.totals(raw) / self.totals(weighed).clamp(min=1.0)
        placement, sets = self.placement, self.sets
        own = placement.samples if placement.shared else None
        if own is None:
            own = torch.arange(len(values), device=values.device)
        # A sample's set is told by the first of the ranks that hold parts of it.
        told = sets.to(values.dtype) * (placement.cp_rank == 0)
        of_samples = values.new_zeros(3, placement.total if placement.shared else len(values))
        of_samples[:, own] = torch.stack([raw.sum(1), weighed.sum(1), told])
        if placement.shared:
            torch.distributed.all_reduce(of_samples, group=placement.group)
        sums, numbers, set_of = of_samples
        means = torch.where(numbers > 0, sums / numbers.clamp(min=1.0), torch.inf)
        every = torch.arange(len(self.selection.count), device=values.device)[:, None]
        ranked = torch.where(set_of == every, means, torch.inf).sort(1).values
        middle = (ranked.isfinite().sum(1, keepdim=True) - 1).clamp(min=0) // 2
        return _by_token(ranked.gather(1, middle)[:, 0], sets)


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


@token_weight(needs=("top_entropies",))
def eaft(tokens: Tokens, _: Chosen, *, alpha: float = 1.0) -> Tensor:
    """Weigh tokens by (H_top20 / 3) ** alpha, not normalized.

    Entropy-adaptive fine-tuning (arXiv 2601.02151, eq. 3).  H_top20 is the entropy of the policy's
    20 likeliest tokens, whose probabilities are scaled to a sum of 1, and has no gradient; 3 stands
    for ln 20.  The paper leaves the scaling open, and has alpha in an ablation alone: both, and the
    default, are those of the implementation that its repository refers to (LLaMA-Factory).
    """
    return (tokens.top_entropies / 3.0) ** alpha


@token_weight()
def talr(tokens: Tokens, chosen: Chosen, *, floor: float = 0.01) -> Tensor:
    """Weigh tokens by max(exp(-L_policy / tau), floor), where tau follows the policy's losses.

    Token-adaptive loss reweighting (arXiv 2509.20758): tau is the median of the mean losses of a
    batch's sequences, here of a set's (Chosen.median_of_means).  The formula is read from summaries
    of the paper, whose code is not public: weights in proportion to p ** (1 / tau), and a lower
    bound.  As in the implementation for arXiv 2602.16093, weights are not normalized, since a bound
    of 0.01 would otherwise be far above them, and the bound is 0.01.
    """
    tau = chosen.median_of_means(tokens.losses).clamp(min=1e-6)
    return torch.exp(-tokens.losses / tau).clamp(min=floor)


@token_weight(needs=("document_positions",))
def exact(
    tokens: Tokens, chosen: Chosen, *, alpha: float = 0.15, gamma: float = 0.5, tau: int = 0
) -> Tensor:
    """Weigh tokens with a long context by 1 + alpha r / mean(r), r = q ** -gamma, others by 1.

    EXACT (arXiv 2605.10544).  A token's context is what precedes it in its document; lengths are
    put into the buckets [0, 7], [8, 15], [16, 31] and so on.  Those that begin at tau or above are
    long, and q is a bucket's share of the long ones.  The mean is over tokens, so that these weigh
    1 + alpha in the mean.  tau = 0 stands for a quarter of the sequence length, as in the paper
    (1024 to 4096 for 4096 to 16384).  The formula is read from a summary of the paper, whose code
    is not public.  The paper counts the buckets of its data, where here those of a set are counted,
    and adds a small number to q; weights are not normalized; and the last token of a sample, one
    more than its windows have, counts to the bucket before it.
    """
    length = tokens.document_positions.shape[1] * chosen.placement.cp_size
    context = (tokens.document_positions + 1).clamp(max=length - 1)
    starts = 8 << torch.arange(max(1, length.bit_length() - 3), device=context.device)
    bucket = torch.bucketize(context, starts, right=True)
    start = torch.where(bucket > 0, starts[bucket - 1], 0)
    long = chosen.where & (start >= (tau or length // 4))
    number = chosen.totals(long.long())
    share = chosen.totals(long.long(), bucket, len(starts) + 1) / number
    rare = torch.where(long, share**-gamma, 0.0)
    return 1.0 + torch.where(long, alpha * rare * number / chosen.totals(rare), 0.0)


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
    "eaft": eaft,
    "talr": talr,
    "exact": exact,
    "longce": longce,
    "context": context,
}
WEIGHTINGS = tuple(WEIGHT_FUNCTIONS)
# Options outside of these would make weights negative, infinite or all 0: (above, up to).
OPTION_LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "softmax": {"temperature": (0.0, math.inf)},
    "eaft": {"alpha": (-TINY, math.inf)},
    "talr": {"floor": (-TINY, 1.0)},
    "exact": {"alpha": (-TINY, math.inf), "gamma": (-TINY, math.inf), "tau": (-TINY, math.inf)},
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
