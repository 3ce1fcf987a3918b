"""The exact top fraction of scores that may be spread over ranks, without gathering them.

How the k-th largest score is found (a radix select on the bits of float32):

    key(score)   a 32-bit integer that sorts as the score does, highest score first
    digit 1      counts of the top 11 bits, summed over ranks -> N, k, and the digit that holds k
    digit 2      counts of the next 11 bits among scores that share digit 1
    digit 3      counts of the last 10 bits -> the k-th score itself, and how many of its ties fit
    ties         counts of ties per segment of the token order -> which of the ties fit

That is four all-reduces of 8 + 8 + 4 KiB and 4 bytes a segment, whatever the number of tokens; on
one rank there are none, and on a GPU one kernel, top_fraction_triton.py, does it all.  Several sets
of tokens (sequences, domains) are selected from at once, in the same four all-reduces.  Nothing
synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.kernels import triton_kernels

_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) of the key, most significant first
_RATIO_UNITS = 1_000_000
MAX_SEGMENTS = ((64 - 20) << 10) // 4


@dataclass(frozen=True)
class Placement:
    """How the samples of a scope lie over the ranks of a group, and so the order of its tokens:
    sample by sample, position by position.

    samples: int64 [b], the number within the scope of each local sample, ascending; None where no
        other rank has any.
    total: samples in the scope.
    run: local samples come in runs of this many with consecutive numbers, the first of which is
        divisible by it.
    cp_rank, cp_size: of the c context-parallel ranks that share a sample, rank r holds chunks r
        and 2c-1-r of its 2c (Megatron's zigzag order).
    group: the ranks; None if this one has them all.
    """

    samples: Tensor | None
    total: int
    run: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    group: ProcessGroup | None = None

    @property
    def shared(self) -> bool:
        """Whether other ranks hold part of the scope."""
        return self.group is not None and self.group.size() > 1


@dataclass(frozen=True)
class Selection:
    """selected: bool [b, s].  The rest are [sets] and hold for whole sets, over all ranks:
    threshold: float32, the lowest selected score; valid, count: int64, valid and selected tokens.
    """

    selected: Tensor
    threshold: Tensor
    valid: Tensor
    count: Tensor


def select_top_fraction(
    scores: Tensor,
    valid: Tensor,
    ratios: Sequence[float] | Tensor,
    sets: Tensor | None = None,
    placement: Placement | None = None,
) -> Selection:
    """Select exactly k = max(1, round_half_up(ratio * N)) of the N valid tokens of each set.

    The k highest scores are selected; among equal scores those at lower token positions (+0 and -0
    are equal).  N = 0 selects nothing.  Ratios count in millionths, so that 0.7 * 45 = 31.5 rounds
    up as written and not as binary floats have it.

    Args:
        scores: float32 [b, s], this rank's part of b samples; no NaN where valid.
        valid: bool [b, s], tokens that may be selected.
        ratios: of each set, in (0, 1].  Numbers that differ are copied to the device, for which
            the host waits.
        sets: int64 [b], the set each sample belongs to; None if there is one.
        placement: how the samples lie over ranks; None if this rank has all, in order.

    Raises:
        ValueError: too many ranks and samples for the bound on traffic.
    """
    if placement is None:
        placement = Placement(None, len(scores))
    if sets is None:
        sets = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    number_of_sets = len(ratios)
    units = _in_units(ratios, scores.device)
    if not placement.shared:
        kernels = triton_kernels("megatron_slm.selection.top_fraction_triton", scores.device)
        if kernels is not None:
            return Selection(*kernels.select(scores, valid, units, sets))
    keys = _descending_keys(scores)
    candidates = valid
    prefix = torch.zeros(number_of_sets, dtype=torch.int64, device=scores.device)
    for position, (shift, width) in enumerate(_DIGITS):
        digits = (keys >> shift) & ((1 << width) - 1)
        counts = torch.zeros(number_of_sets << width, dtype=torch.int32, device=scores.device)
        where = digits + (sets << width)[:, None]
        counts.index_add_(0, where.flatten(), candidates.flatten().to(torch.int32))
        upto = _total(counts, placement).view(number_of_sets, -1).cumsum(1)
        if position == 0:
            number_valid = upto[:, -1]
            number_selected = _round_half_up(units, number_valid)
            remaining = number_selected
        digit = (upto < remaining[:, None]).sum(1)
        before = upto.gather(1, (digit - 1).clamp(min=0)[:, None]).squeeze(1)
        remaining = remaining - torch.where(digit > 0, before, 0)
        candidates = candidates & (digits == digit[sets][:, None])
        prefix = (prefix << width) | digit

    # candidates are now the ties at the thresholds, of which `remaining` fit.
    fits = _rank_among_ties(candidates, sets, placement, number_of_sets) < remaining[sets][:, None]
    selected = (valid & (keys < prefix[sets][:, None])) | (candidates & fits)
    return Selection(selected, _score_of(prefix), number_valid, number_selected)


def _in_units(ratios: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Return ratios in millionths, int64 [sets]."""
    if isinstance(ratios, Tensor):
        return (ratios * _RATIO_UNITS).round().long()
    units = [round(ratio * _RATIO_UNITS) for ratio in ratios]
    if len(set(units)) == 1:
        return torch.full((len(units),), units[0], dtype=torch.int64, device=device)
    return torch.tensor(units, dtype=torch.int64, device=device)


def selected_of(number: int, ratio: float) -> int:
    """Return how many of `number` valid tokens a ratio selects, as select_top_fraction does."""
    rounded = (2 * round(ratio * _RATIO_UNITS) * number + _RATIO_UNITS) // (2 * _RATIO_UNITS)
    return min(max(rounded, 1), number)


def _total(counts: Tensor, placement: Placement) -> Tensor:
    """Sum over the ranks of a placement, int64."""
    if placement.shared:
        torch.distributed.all_reduce(counts, group=placement.group)
    return counts.long()


def segments(samples: int, run: int, cp_size: int, number_of_sets: int) -> int:
    """How many a scope has, at most MAX_SEGMENTS; arguments as in Placement."""
    length, chunks = _cut(run, cp_size, number_of_sets)
    return -(-samples // length) * chunks


def _cut(run: int, cp_size: int, number_of_sets: int) -> tuple[int, int]:
    """A segment is so many samples long, and a sample has so many segments; one of them is 1."""
    chunks = 2 * cp_size if cp_size > 1 else 1
    return (run if chunks == 1 and number_of_sets == 1 else 1), chunks


def _rank_among_ties(
    ties: Tensor, sets: Tensor, placement: Placement, number_of_sets: int
) -> Tensor:
    """How many ties of a token's set come before it in token order, int64 [b, s].

    A segment is a run of consecutive positions that lies on one rank and in one set; the table of
    ties per segment is all that ranks exchange.
    """
    # Local positions ascend with token order, so a running count per set is the rank among local
    # ties; what other ranks hold before a segment is the rest.
    flat = ties.long()
    within = flat.cumsum(1) - flat
    per_sample = flat.sum(1)
    same = (sets[:, None] == sets[None, :]).tril(-1)
    samples_before = (same * per_sample[None, :]).sum(1)
    local_rank = within + samples_before[:, None]
    if not placement.shared:
        return local_rank

    run, chunks = _cut(placement.run, placement.cp_size, number_of_sets)
    number = segments(placement.total, placement.run, placement.cp_size, number_of_sets)
    if number > MAX_SEGMENTS:
        raise ValueError(
            f"a scope of {placement.total} samples over {placement.cp_size} context-parallel ranks "
            f"has {number} segments, more than {MAX_SEGMENTS}; use a narrower scope"
        )
    assert placement.samples is not None
    length = ties.shape[1]
    chunk = torch.zeros(length, dtype=torch.int64, device=ties.device)
    if chunks > 1:
        chunk[: length // 2] = placement.cp_rank
        chunk[length // 2 :] = chunks - 1 - placement.cp_rank
    segment = (placement.samples // run * chunks)[:, None] + chunk

    table = torch.zeros(2 * number, dtype=torch.int32, device=ties.device)
    mine = table[:number]
    mine.index_add_(0, segment.flatten(), ties.flatten().to(torch.int32))
    local = mine.long()
    if number_of_sets > 1 and placement.cp_rank == 0:
        every = segment[:, :1] + torch.arange(chunks, device=ties.device)
        table[number:][every] = sets[:, None].to(torch.int32)
    if number_of_sets == 1:
        table = mine
    whole = _total(table, placement)
    set_of_segment = whole[number:] if number_of_sets > 1 else torch.zeros_like(local)
    before = _before_in_set(whole[:number], set_of_segment, number_of_sets)
    before_here = _before_in_set(local, set_of_segment, number_of_sets)
    return local_rank + (before - before_here)[segment]


def _before_in_set(ties: Tensor, sets: Tensor, number_of_sets: int) -> Tensor:
    """Ties in earlier segments of the same set, int64 [segments]."""
    if number_of_sets == 1:
        return ties.cumsum(0) - ties
    order = sets.argsort(stable=True)
    running = ties[order].cumsum(0) - ties[order]
    # Where a set begins in the order, what earlier sets counted is taken off.
    totals = torch.zeros(number_of_sets, dtype=torch.int64, device=ties.device)
    totals.index_add_(0, sets, ties)
    running -= (totals.cumsum(0) - totals)[sets[order]]
    return torch.empty_like(running).index_copy_(0, order, running)


def _round_half_up(units: Tensor, number: Tensor) -> Tensor:
    """max(1, floor(ratio * number + 1/2)) in integers; 0 of 0."""
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
