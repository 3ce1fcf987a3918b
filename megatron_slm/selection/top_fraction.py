"""Select exactly the top fraction of scores that are spread over ranks, without gathering them.

The k-th largest score is found by a radix select on the bits of float32:

    key(score)   a 32-bit integer that sorts as the score does, highest score first
    digit 1      counts of the top 11 bits, summed over ranks -> N, k, and the digit that holds k
    digit 2      counts of the next 11 bits among scores that share digit 1
    digit 3      counts of the last 10 bits -> the k-th score itself, and how many of its ties fit
    ties         counts of ties per segment of the token order -> which of the ties fit

That is four all-reduces of 8 KiB, 8 KiB, 4 KiB and 4 bytes a segment, whatever the number of
tokens.  On one rank there are none, and on a GPU top_fraction_triton.py does it all in one kernel.
The same four all-reduces serve several sets of tokens (sequences, domains) at once.  Nothing
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
    """How the samples of a scope lie over the ranks of a group.

    This also says in which order the scope's tokens come: sample by sample, position by position.
    """

    samples: Tensor | None
    """Numbers within the scope of the local samples, int64 [b], ascending; None if this rank holds
    all samples."""
    total: int
    """Samples in the scope."""
    run: int = 1
    """Local samples come in runs of this many consecutive numbers, of which the first is divisible
    by it."""
    cp_rank: int = 0
    """Rank among the context-parallel ranks that share each sample: rank r of c holds the chunks r
    and 2c - 1 - r of a sample's 2c (Megatron's zigzag order)."""
    cp_size: int = 1
    """Number of these ranks, c."""
    group: ProcessGroup | None = None
    """The ranks over which the scope is spread; None if this rank holds all of it."""

    @property
    def shared(self) -> bool:
        """Whether other ranks hold part of the scope."""
        return self.group is not None and self.group.size() > 1


@dataclass(frozen=True)
class Selection:
    """The tokens selected.  All but `selected` describe whole sets, over all ranks."""

    selected: Tensor
    """Which of this rank's tokens are selected, bool [b, s]."""
    threshold: Tensor
    """The lowest selected score of each set, float32 [sets]."""
    valid: Tensor
    """The number of valid tokens of each set, int64 [sets]."""
    count: Tensor
    """The number of selected tokens of each set, int64 [sets]."""


def select_top_fraction(
    scores: Tensor,
    valid: Tensor,
    ratios: Sequence[float] | Tensor,
    sets: Tensor | None = None,
    placement: Placement | None = None,
) -> Selection:
    """Select exactly k = max(1, round_half_up(ratio * N)) of the N valid tokens of each set.

    The k highest scores are selected; among equal scores (+0 and -0 are equal), those at lower
    token positions.  Of N = 0 tokens none is selected.  Ratios are rounded to millionths, so that
    0.7 * 45 = 31.5 is rounded up as it is written, and not down as binary floats might have it.

    Args:
        scores: this rank's part of b samples, float32 [b, s]; not NaN where valid.
        valid: which tokens may be selected, bool [b, s].
        ratios: the ratio of each set, in (0, 1].  If they are numbers and differ, they are copied
            to the device, and the host waits for that.
        sets: the set of each sample, int64 [b]; None if there is a single set.
        placement: how the samples lie over ranks; None if this rank holds all of them, in order.

    Raises:
        ValueError: the scope has too many samples and ranks for the bound on traffic.
    """
    if placement is None:
        placement = Placement(None, len(scores))
    if sets is None:
        sets = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    number_of_sets = len(ratios)
    units = in_units(ratios, scores.device)
    if not placement.shared:
        kernels = triton_kernels("megatron_slm.selection.top_fraction_triton", scores.device)
        if kernels is not None:
            return Selection(*kernels.select(scores, valid, units, sets))
    keys = descending_keys(scores)
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
            number_selected = round_half_up(units, number_valid)
            remaining = number_selected
        digit = (upto < remaining[:, None]).sum(1)
        before = upto.gather(1, (digit - 1).clamp(min=0)[:, None]).squeeze(1)
        remaining = remaining - torch.where(digit > 0, before, 0)
        candidates = candidates & (digits == digit[sets][:, None])
        prefix = (prefix << width) | digit

    # The candidates are now the ties at the thresholds, of which `remaining` fit.
    fits = _rank_among_ties(candidates, sets, placement, number_of_sets) < remaining[sets][:, None]
    selected = (valid & (keys < prefix[sets][:, None])) | (candidates & fits)
    return Selection(selected, score_of_key(prefix), number_valid, number_selected)


def in_units(ratios: Sequence[float] | Tensor, device: torch.device) -> Tensor:
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


def numbers_selected(number: Tensor, ratios: Sequence[float] | Tensor) -> Tensor:
    """Return how many of each set's valid tokens select_top_fraction selects, int64 [sets].

    Args:
        number: the valid tokens of each set, int64 [sets].
        ratios: the ratio of each set.
    """
    return round_half_up(in_units(ratios, number.device), number)


def _total(counts: Tensor, placement: Placement) -> Tensor:
    """Sum counts over the ranks of a placement, as int64."""
    if placement.shared:
        torch.distributed.all_reduce(counts, group=placement.group)
    return counts.long()


def segments(samples: int, run: int, cp_size: int, number_of_sets: int) -> int:
    """Count the segments of a scope, of which there may be at most MAX_SEGMENTS.

    Args:
        samples: samples in the scope.
        run: as in Placement.
        cp_size: as in Placement.
        number_of_sets: sets of tokens in the scope.
    """
    length, chunks = _cut(run, cp_size, number_of_sets)
    return -(-samples // length) * chunks


def _cut(run: int, cp_size: int, number_of_sets: int) -> tuple[int, int]:
    """Return how many samples a segment spans, and how many segments a sample has; one is 1."""
    chunks = 2 * cp_size if cp_size > 1 else 1
    return (run if chunks == 1 and number_of_sets == 1 else 1), chunks


def _rank_among_ties(
    ties: Tensor, sets: Tensor, placement: Placement, number_of_sets: int
) -> Tensor:
    """Count, for each token, the ties of its set that come before it in token order, int64 [b, s].

    A segment is a run of consecutive positions that lie on one rank and in one set.  All that ranks
    exchange is a table of the ties in each segment.
    """
    # Local positions ascend with token order, so a running count in each set is the rank among
    # local ties.  The ties that other ranks hold before a token's segment are added to it.
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
    """Count the ties in earlier segments of the same set, int64 [segments]."""
    if number_of_sets == 1:
        return ties.cumsum(0) - ties
    order = sets.argsort(stable=True)
    running = ties[order].cumsum(0) - ties[order]
    # Take off what earlier sets in this order have counted.
    totals = torch.zeros(number_of_sets, dtype=torch.int64, device=ties.device)
    totals.index_add_(0, sets, ties)
    running -= (totals.cumsum(0) - totals)[sets[order]]
    return torch.empty_like(running).index_copy_(0, order, running)


def round_half_up(units: Tensor, number: Tensor) -> Tensor:
    """Return max(1, floor(ratio * number + 1/2)), or 0 if the number is 0, in integer arithmetic.

    Args:
        units: the ratio of each set, in millionths.
        number: the valid tokens of each set.
    """
    rounded = (2 * units * number + _RATIO_UNITS) // (2 * _RATIO_UNITS)
    return torch.minimum(rounded.clamp(min=1), number)


def descending_keys(scores: Tensor) -> Tensor:
    """Map float32 scores to integers in [0, 2^32), int64, that sort in the opposite order."""
    bits = (scores + 0.0).view(torch.int32).long()  # adding 0.0 turns -0 into +0
    return torch.where(bits < 0, bits + (1 << 32), (1 << 31) - 1 - bits)


def score_of_key(key: Tensor) -> Tensor:
    """Map keys back to their scores; the inverse of descending_keys."""
    bits = torch.where(key >= 1 << 31, key - (1 << 32), (1 << 31) - 1 - key)
    return bits.to(torch.int32).view(torch.float32)
