"""The functions of softmax.py as one Triton kernel each, which read logits once, in their own type.

Right after its product, most of a chunk of logits is still in the GPU's cache.  Plain torch passes
over it a dozen times, and makes a float32 copy of bfloat16 logits; a kernel reads it once, and in
the same pass replaces it by its gradient.  All arithmetic is in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a row that a program holds in registers at a time: 8 float32 a thread.
BLOCK, WARPS = 2048, 8


def try_out(device: torch.device) -> None:
    """Call every kernel once, on tiny tensors; Triton raises if it cannot compile them."""
    logits, maximum, scale = (torch.zeros(shape, device=device) for shape in ((1, 2), 1, 1))
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    for rows in (2, 3):
        sums = torch.zeros(rows, 1, device=device)
        add_chunk(sums, maximum, logits, labels, 0)
    logits_gradient(logits, labels, 0, maximum, sums[1], scale)


def add_chunk(sums: Tensor, maximum: Tensor, logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Do what softmax.add_chunk does; overwrite the maximum, but not the logits."""
    rows, columns = logits.shape
    assert logits.is_contiguous() and sums.is_contiguous() and maximum.is_contiguous()
    add_chunk_kernel[(rows,)](
        logits,
        labels,
        first,
        maximum,
        sums,
        rows,
        columns,
        ENTROPIES=sums.shape[0] == 3,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return maximum


def logits_gradient(
    logits: Tensor, labels: Tensor, first: int, maximum: Tensor, sum_exp: Tensor, scale: Tensor
) -> Tensor:
    """Do what softmax.logits_gradient does, in place."""
    rows, columns = logits.shape
    assert logits.is_contiguous()
    if rows > 0:
        logits_gradient_kernel[(rows, triton.cdiv(columns, BLOCK))](
            logits,
            labels,
            first,
            maximum,
            sum_exp,
            scale.contiguous(),
            columns,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return logits


@triton.jit
def add_chunk_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    first,
    maximum,
    sums,
    rows,
    columns,
    ENTROPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a chunk to its rows' sums; each program takes one row through its columns."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * columns
    top = tl.load(maximum + row)
    exp_sum = tl.load(sums + rows + row)
    if ENTROPIES:
        weighted = tl.load(sums + 2 * rows + row)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        logit = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(logit, axis=0))
        shifted = logit - higher
        exp = tl.exp(shifted)
        down = top - higher
        if ENTROPIES:
            added = tl.sum(tl.where(inside, exp * shifted, 0.0), axis=0)
            weighted = (weighted + down * exp_sum) * tl.exp(down) + added
        exp_sum = exp_sum * tl.exp(down) + tl.sum(exp, axis=0)
        top = higher
    tl.store(maximum + row, top)
    tl.store(sums + rows + row, exp_sum)
    if ENTROPIES:
        tl.store(sums + 2 * rows + row, weighted)
    label = tl.load(labels + row) - first
    if (label >= 0) & (label < columns):
        target = tl.load(sums + row) + tl.load(logits + label).to(tl.float32)
        tl.store(sums + row, target)


@triton.jit
def logits_gradient_kernel(  # type: ignore[no-untyped-def]
    logits, labels, first, maximum, sum_exp, scale, columns, BLOCK: tl.constexpr
):
    """Replace logits by their gradient; each program takes BLOCK columns of one row."""
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    logits += row.to(tl.int64) * columns
    by_loss = tl.load(scale + row)
    logit = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)
    softmax = tl.exp(logit - tl.load(maximum + row)) / tl.load(sum_exp + row)
    label = tl.load(labels + row) - first
    gradient = by_loss * tl.where(offsets == label, softmax - 1.0, softmax)
    tl.store(logits + offsets, gradient.to(logits.dtype.element_ty), mask=inside)
