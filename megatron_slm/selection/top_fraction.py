"""The exact top fraction of scores that may be spread over ranks, without gathering them.

How the k-th largest score is found (a radix select on the bits of float32):

    key(score)   a 32-bit integer that sorts as the score does, highest score first
    digit 1      counts of the top 11 bits, summed over ranks -> N, k, and the digit that holds k
    digit 2      counts of the next 11 bits among scores that share digit 1
    digit 3      counts of the last 10 bits -> the k-th score itself, and how many of its ties fit
    ties         counts of ties per segment of the token order -> which of the ties fit

That is four all-reduces of at most 8 + 8 + 4 KiB and 4 bytes a segment, whatever the number of
tokens; on one rank there are none.  Nothing synchronises with the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the key, most significant first
_RATIO_UNITS = 1_000_000


@dataclass(frozen=True)
class Segments:
    """How a rank's tokens lie in the token order of all ranks of a group.

    A segment is a run of consecutive token positions that one rank holds.
    index: int64 [n], the segment of each local token, never decreasing along n.
    count: segments in the whole scope, the same on every rank.
    """

    index: Tensor
    count: int

    @staticmethod
    def zigzag(samples: int, length: int, rank: int, size: int, device: torch.device) -> Segments:
        """Megatron's context-parallel order: rank r holds chunks r and 2*size-1-r of a sequence.

        samples, length: local tokens are [samples, length], flattened.
        """
        chunk = torch.tensor([rank, 2 * size - 1 - rank], device=device)
        within = chunk.repeat_interleave(length // 2)
        start = torch.arange(samples, device=device) * (2 * size)
        return Segments((start[:, None] + within).flatten(), samples * 2 * size)


@dataclass(frozen=True)
class Selection:
    """selected: bool [n].  The rest are 0-dim and describe the whole scope, over all ranks:
    threshold: float32, the lowest selected score; valid, count: int64, valid and selected tokens.
    """

    selected: Tensor
    threshold: Tensor
    valid: Tensor
    count: Tensor


def select_top_fraction(
    scores: Tensor,
    valid: Tensor,
    ratio: float,
    group: ProcessGroup | None = None,
    segments: Segments | None = None,
) -> Selection:
    """Select exactly k = max(1, round_half_up(ratio * N)) of the N valid tokens of a scope.

    The k highest scores are selected; among equal scores those at lower token positions (+0 and -0
    are equal).  N = 0 selects nothing.  `ratio` counts in millionths, so that 0.7 * 45 = 31.5
    rounds up as written and not as binary floats have it.

    Args:
        scores: float32 [n], local tokens in token order; no NaN where valid.
        valid: bool [n], tokens that may be selected.
        ratio: in (0, 1].
        group: ranks that hold the scope together; None when this rank holds it alone.
        segments: where local tokens lie in the order of all; needed with a group of several.
    """
    shared = group is not None and group.size() > 1
    if shared and segments is None:
        raise ValueError("a scope over several ranks needs the segments of its token order")

    def total(counts: Tensor) -> Tensor:
        if shared:
            torch.distributed.all_reduce(counts, group=group)
        return counts.long()

    keys = _descending_keys(scores)
    candidates = valid
    prefix = torch.zeros((), dtype=torch.int64, device=scores.device)
    for position, (shift, width) in enumerate(_DIGITS):
        digits = (keys >> shift) & ((1 << width) - 1)
        counts = torch.zeros(1 << width, dtype=torch.int32, device=scores.device)
        counts.index_add_(0, digits, candidates.to(torch.int32))
        upto = total(counts).cumsum(0)
        if position == 0:
            number_valid = upto[-1]
            number_selected = _round_half_up(ratio, number_valid)
            remaining = number_selected
        digit = (upto < remaining).sum()
        before = torch.where(digit > 0, upto[(digit - 1).clamp(min=0)], 0)
        remaining = remaining - before
        candidates = candidates & (digits == digit)
        prefix = (prefix << width) | digit

    # candidates are now the ties at the threshold, of which `remaining` fit.
    ties = candidates.to(torch.int64)
    rank_among_ties = ties.cumsum(0) - ties
    if shared:
        assert segments is not None
        mine = torch.zeros(segments.count, dtype=torch.int32, device=scores.device)
        mine.index_add_(0, segments.index, ties.to(torch.int32))
        mine_before = _exclusive_cumsum(mine.long())
        all_before = _exclusive_cumsum(total(mine))
        rank_among_ties = rank_among_ties + (all_before - mine_before)[segments.index]
    selected = (valid & (keys < prefix)) | (candidates & (rank_among_ties < remaining))
    return Selection(selected, _score_of(prefix), number_valid, number_selected)


def _round_half_up(ratio: float, number: Tensor) -> Tensor:
    """max(1, floor(ratio * number + 1/2)) in integers; 0 of 0."""
    units = round(ratio * _RATIO_UNITS)
    rounded = (2 * units * number + _RATIO_UNITS) // (2 * _RATIO_UNITS)
    return torch.minimum(rounded.clamp(min=1), number)


def _descending_keys(scores: Tensor) -> Tensor:
    """int64 in [0, 2^32) that sort in the opposite order of float32 scores."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes -0 the bits of +0
    return torch.where(bits < 0, bits + (1 << 32), (1 << 31) - 1 - bits)


def _score_of(key: Tensor) -> Tensor:
    """The inverse of _descending_keys."""
    bits = torch.where(key >= 1 << 31, key - (1 << 32), (1 << 31) - 1 - key)
    return bits.to(torch.int32).view(torch.float32)


def _exclusive_cumsum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
