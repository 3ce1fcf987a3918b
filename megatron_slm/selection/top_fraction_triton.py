"""Do what select_top_fraction does in one Triton kernel, if one rank holds the whole scope.

Plain torch launches a hundred small kernels for this, and a GPU spends more time waiting for them
than computing.  Here one program passes over a set's tokens, which lie in the GPU's cache, six
times: once to count them, once for each of the four bytes of the k-th key, and once to select.
Keys, rounding and ties are those of top_fraction.py, in integers, so that the result is the same to
the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens that a program holds at a time, 8 in each thread.
BLOCK, WARPS = 4096, 16


def try_out(device: torch.device) -> None:
    """Call the kernel once in each form, on tiny tensors; Triton raises if it cannot compile it."""
    scores = torch.zeros(1, 2, device=device)
    for number in (1, 2):
        units = torch.ones(number, dtype=torch.int64, device=device)
        sets = torch.zeros(1, dtype=torch.int64, device=device)
        select(scores, scores > 0, units, sets)


def select(
    scores: Tensor, valid: Tensor, units: Tensor, sets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the top fraction of each set.

    Args:
        scores: the tokens' scores, float32 [b, s].
        valid: which tokens may be selected, bool [b, s].
        units: the ratio of each set, in millionths, int64 [sets].
        sets: the set of each sample, int64 [b].

    Returns:
        The fields of a Selection, in order: selected tokens, thresholds, valid and selected counts.
    """
    number = len(units)
    selected = torch.empty_like(valid, memory_format=torch.contiguous_format)
    threshold = torch.empty(number, dtype=torch.float32, device=scores.device)
    counts = torch.empty(2, number, dtype=torch.int64, device=scores.device)
    select_kernel[(number,)](
        scores.contiguous().view(torch.int32),
        valid.contiguous().view(torch.uint8),
        sets,
        units,
        selected.view(torch.uint8),
        threshold.view(torch.int32),
        counts,
        scores.numel(),
        scores.shape[1],
        number,
        ONE_SET=number == 1,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return selected, threshold, counts[0], counts[1]


@triton.jit
def _keys(scores, offsets, inside):  # type: ignore[no-untyped-def]
    """Load scores, float32 read as int32, and map them to keys as descending_keys does."""
    bits = tl.load(scores + offsets, mask=inside, other=0).to(tl.int64)
    bits = tl.where(bits == -(1 << 31), 0, bits)  # -0 is +0
    return tl.where(bits < 0, bits + (1 << 32), (1 << 31) - 1 - bits)


@triton.jit
def _valid(valid, sets, offsets, inside, length, ONE_SET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load which tokens of this program's set may be selected."""
    may = tl.load(valid + offsets, mask=inside, other=0) != 0
    if not ONE_SET:
        may &= tl.load(sets + offsets // length, mask=inside, other=-1) == tl.program_id(0)
    return may


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    scores,
    valid,
    sets,
    units,
    selected,
    threshold,
    counts,
    tokens,
    length,
    number,
    ONE_SET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the top fraction of each set; each program takes one set."""
    own = tl.program_id(0)
    found = tl.full((), 0, tl.int32)
    for start in range(0, tokens, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        may = _valid(valid, sets, offsets, offsets < tokens, length, ONE_SET)
        found += tl.sum(may.to(tl.int32), axis=0)
    wide = found.to(tl.int64)
    # max(1, floor(ratio * number + 1/2)), or 0 if the number is 0
    count = (2 * tl.load(units + own) * wide + 1000000) // 2000000
    count = tl.minimum(tl.maximum(count, 1), wide)
    tl.store(counts + own, wide)
    tl.store(counts + number + own, count)

    remaining = count.to(tl.int32)
    prefix = tl.full((), 0, tl.int64)
    for shift in tl.static_range(24, -1, -8):
        of_byte = tl.zeros((256,), tl.int32)
        for start in range(0, tokens, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < tokens
            key = _keys(scores, offsets, inside)
            may = _valid(valid, sets, offsets, inside, length, ONE_SET)
            may &= (key >> (shift + 8)) == prefix
            of_byte += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=may)
        upto = tl.cumsum(of_byte, axis=0)
        digit = tl.sum((upto < remaining).to(tl.int32), axis=0)
        remaining -= tl.sum(tl.where(tl.arange(0, 256) == digit - 1, upto, 0), axis=0)
        prefix = prefix * 256 + digit
    bits = tl.where(prefix >= (1 << 31), prefix - (1 << 32), (1 << 31) - 1 - prefix)
    tl.store(threshold + own, bits.to(tl.int32))

    ties = tl.full((), 0, tl.int32)
    for start in range(0, tokens, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < tokens
        key = _keys(scores, offsets, inside)
        may = _valid(valid, sets, offsets, inside, length, ONE_SET)
        tie = (may & (key == prefix)).to(tl.int32)
        before = ties + tl.cumsum(tie, axis=0) - tie
        chosen = may & ((key < prefix) | ((tie != 0) & (before < remaining)))
        if ONE_SET:
            here = inside
        else:  # each set's program writes its own samples
            here = inside & (tl.load(sets + offsets // length, mask=inside, other=-1) == own)
        tl.store(selected + offsets, chosen.to(tl.uint8), mask=here)
        ties += tl.sum(tie, axis=0)
