"""Vocab-parallel cross entropy in chunks: all losses first, gradients for the selected only.

    token_losses    for chunk of columns: logits = h W^T; update max, sum exp, target     (no grad)
                    then one all-reduce MAX [n] and one SUM [2, n] over TP make losses [n]
    (selection)     k of the n rows, perhaps with a weight each, or of weight 0 where fewer count
    selected_loss   forward: sum of the losses already known, nothing is recomputed
                    backward, for chunk of columns, k rows: logits again, softmax - one-hot,
                    dh += dlogits W, this chunk's rows of dW = dlogits^T h

No [n, v/t] tensor exists; logits live one chunk of the vocabulary at a time.  A chunk has all
rows, so its products are large and its part of dW is complete: dW needs no accumulator.  n tokens,
k selected, h hidden, v padded vocabulary, t tensor-parallel size, e bytes per weight; against
Megatron's dense head:

                     this head                          dense head
    FLOPs            (2n + 6k) h v/t                     6n h v/t
    logits, bytes    one chunk: 16 MiB (GPU 64) of       [n, v/t]: float32 softmax, and in bf16
                     float32, or 4 KiB a row if more     the e-byte logits or their gradient
    kept for bwd     k h e + 24 k (28 k with weights)    n h e (or /t with SP) + the softmax
    TP collectives   fwd MAX [n], SUM [2, n], bcast [n]  fwd MAX, SUM, SUM of [n]
                     bwd SUM [k, h]                      bwd SUM [n, h]

With sequence parallelism the caller gathers hidden states (and its backward reduce-scatters); the
dense head gathers them twice.  Entropies take one more SUM [n] and row of bcast, and the logits of
token_losses two chunks.  On a GPU softmax_triton.py goes over a chunk's logits once in token_losses
and once in the backward, and the products that add up to dh leave the matrix units in float32;
elsewhere softmax.py does the same in plain torch, and a product is written before it is added.

A model's vocabulary is padded to suit its tensor-parallel size.  Megatron trains with padding in
the softmax; tokens are scored without.  Chunks of padding come last, and are added to a copy of the
sums, so that losses to score by are bit for bit those of a pass that leaves padding away.  It takes
one more row of MAX and bcast and one more SUM [n]; nothing where there is no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_slm.kernels import triton_kernels
from megatron_slm.loss import softmax
from megatron_slm.loss.softmax import raise_maximum
from megatron_slm.loss.weight_gradient import WeightGradient, add_product

# A CPU's cache holds a chunk; a GPU wants fewer and larger kernels.  Products of fewer than
# MIN_COLUMNS are slow on both.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
MIN_COLUMNS = 1024


@dataclass(frozen=True)
class TokenLosses:
    """Losses and the softmax statistics that the backward needs, each float32 [n].

    losses: nats, by a softmax without padding.
    trained: nats, by a softmax with padding if it was asked for; else the same as losses.
    maximum, sum_exp: of the latter softmax, which is exp(logits - maximum) / sum_exp.
    entropies: of the softmax without padding, nats; None unless asked for.

    Losses and entropies are the same bits on every tensor-parallel rank.
    """

    losses: Tensor
    trained: Tensor
    maximum: Tensor
    sum_exp: Tensor
    entropies: Tensor | None = None


def chunk_columns(rows: int, device: str) -> int:
    """Columns of a chunk: float32 logits of `rows` rows fill CHUNK_BYTES; a multiple of 64."""
    return max(MIN_COLUMNS, CHUNK_BYTES[device] // (4 * max(1, rows)) // 64 * 64)


def softmax_functions(device: torch.device) -> ModuleType:
    """Return softmax_triton where Triton works, else softmax."""
    return triton_kernels("megatron_slm.loss.softmax_triton", device) or softmax


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: ProcessGroup,
    *,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    vocabulary: int | None = None,
    with_padding: bool = False,
    entropies: bool = False,
) -> TokenLosses:
    """-log P(label) of every token, without gradient.

    The softmax is summed online: when a chunk of the vocabulary raises a row's maximum, the sums
    so far are brought to the new one.

    Args:
        hidden: [n, h], the same on every rank of tp_group.
        weight: [v/t, h], this rank's rows of the output layer.
        labels: int64 [n], in [0, v).
        scale_logits: applied to logits, as GPTModel does with MuP.
        vocabulary: columns from here on are padding; None: there is none.
        with_padding: also the losses of a softmax with padding.
        entropies: also -sum P log P of every token.
    """
    rank, size = tp_group.rank(), tp_group.size()
    columns_here = weight.shape[0]
    start = rank * columns_here
    vocabulary = size * columns_here if vocabulary is None else vocabulary
    padding = max(0, min(columns_here, vocabulary - start))  # where it begins
    padded = with_padding and vocabulary < size * columns_here
    rows = hidden.shape[0]
    functions = softmax_functions(hidden.device)

    @torch.no_grad()
    def add(sums: Tensor, maximum: Tensor, first: int, last: int) -> Tensor:
        for columns in _chunks(rows, hidden.device.type, first, last):
            logits = _logits(hidden, weight[columns], scale_logits)
            maximum = functions.add_chunk(sums, maximum, logits, labels, start + columns.start)
        return maximum

    sums = hidden.new_zeros((3 if entropies else 2, rows), dtype=torch.float32)
    # Lower than any logit, but finite: the difference of two maxima is a number.
    lowest = hidden.new_full((rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
    maximum = top = add(sums, lowest, 0, padding)
    whole = sums
    if padded:
        whole = sums[:2].clone()
        top = add(whole, maximum.clone(), padding, columns_here)
    if size > 1:
        maximum, top = _over_ranks(sums, maximum, whole, top, tp_group)
    log_sum = torch.log(sums[1])
    results = [log_sum - (sums[0] - maximum)]
    if padded:
        results.append(torch.log(whole[1]) - (sums[0] - top))
    if entropies:
        results.append(log_sum - sums[2] / sums[1])
    result = torch.stack(results)
    if size > 1:
        # Ranks that disagreed on a bit would select, and train on, different tokens.
        torch.distributed.broadcast(result, group=tp_group, group_src=0)
    return TokenLosses(
        losses=result[0],
        trained=result[1 if padded else 0],
        maximum=top,
        sum_exp=whole[1],
        entropies=result[-1] if entropies else None,
    )


def _over_ranks(
    sums: Tensor, maximum: Tensor, whole: Tensor, top: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Bring sums, in place, to those over all ranks' columns; returns their maxima.

    Args:
        sums, maximum: without padding, as softmax.add_chunk has them.
        whole, top: with padding; where there is none, sums and maximum themselves.
    """
    padded = whole is not sums
    highest = torch.stack([maximum, top] if padded else [maximum])
    torch.distributed.all_reduce(highest, ReduceOp.MAX, group=group)
    raise_maximum(maximum, highest[0], sums)
    # Alone: the order in which ranks are added up depends on a tensor's size, and these sums have
    # to be the same in every pass.
    torch.distributed.all_reduce(sums[:2], group=group)
    if sums.shape[0] == 3:
        torch.distributed.all_reduce(sums[2], group=group)
    if padded:
        raise_maximum(top, highest[1], whole)
        torch.distributed.all_reduce(whole[1], group=group)
    return highest[0], highest[-1]


def selected_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scored: TokenLosses,
    index: Tensor,
    tp_group: ProcessGroup,
    *,
    weights: Tensor | None = None,
    reduce_hidden_gradient: bool,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    accumulate_into_main_grad: bool = False,
) -> Tensor:
    """Sum of the trained losses at `index`, float32 0-dim, differentiable in hidden and weight.

    An empty index gives a zero that still carries the graph: under pipeline parallelism a last
    stage without a gradient to send back would leave the others waiting.

    Args:
        index: int64 [k], rows of hidden.
        weights: float32 [k], multiplies each of these rows' losses; None for all 1.
        reduce_hidden_gradient: sum the hidden gradient over tp_group (TP without SP; with SP the
            gather's own backward does it).
        accumulate_into_main_grad: add the weight's gradient to weight.main_grad, as Megatron's
            gradient accumulation fusion does.
    """
    return _SelectedLoss.apply(
        hidden,
        weight,
        labels,
        scored,
        index,
        weights,
        tp_group,
        reduce_hidden_gradient and tp_group.size() > 1,
        scale_logits,
        accumulate_into_main_grad,
    )


class _SelectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        scored: TokenLosses,
        index: Tensor,
        weights: Tensor | None,
        tp_group: ProcessGroup,
        reduce_hidden_gradient: bool,
        scale_logits: Callable[[Tensor], Tensor] | None,
        accumulate_into_main_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            hidden.index_select(0, index),
            weight,
            labels[index],
            scored.maximum[index],
            scored.sum_exp[index],
            index,
            weights,
        )
        ctx.hidden_shape = hidden.shape
        ctx.tp_group = tp_group
        ctx.reduce_hidden_gradient = reduce_hidden_gradient
        ctx.scale_logits = scale_logits
        ctx.accumulate_into_main_grad = accumulate_into_main_grad
        losses = scored.trained[index]
        return (losses if weights is None else losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        hidden, weight, labels, maximum, sum_exp, index, weights = ctx.saved_tensors
        rows, columns_here = hidden.shape[0], weight.shape[0]
        start = ctx.tp_group.rank() * columns_here
        scale = grad_output.float()
        if ctx.scale_logits is not None:
            scale = scale * ctx.scale_logits(torch.ones_like(scale))
        scale = scale.expand(rows) if weights is None else scale * weights
        grad_selected = torch.zeros_like(hidden, dtype=torch.float32)
        weight_gradient = WeightGradient(weight, ctx.accumulate_into_main_grad)
        functions = softmax_functions(hidden.device)
        pending = None
        for columns in _chunks(rows, hidden.device.type, 0, columns_here):
            gradient = functions.logits_gradient(
                _logits(hidden, weight[columns], ctx.scale_logits),
                labels,
                start + columns.start,
                maximum,
                sum_exp,
                scale,
            )
            add_product(grad_selected, gradient, weight[columns])
            if columns.stop == columns_here:
                # Complete, and summed over ranks while the last rows of dW are computed.
                grad_selected = grad_selected.to(hidden.dtype)
                if ctx.reduce_hidden_gradient:
                    pending = torch.distributed.all_reduce(
                        grad_selected, group=ctx.tp_group, async_op=True
                    )
            weight_gradient.set(columns, gradient, hidden)
            del gradient  # before there are the next chunk's logits
        grad_hidden = hidden.new_zeros(ctx.hidden_shape)
        if pending is not None:
            pending.wait()
        grad_hidden.index_copy_(0, index, grad_selected)
        return grad_hidden, weight_gradient.result(), *[None] * 8


def _chunks(rows: int, device: str, first: int, last: int) -> Iterator[slice]:
    """Consecutive slices of columns [first, last), to be computed for all rows."""
    step = chunk_columns(rows, device)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _logits(
    hidden: Tensor, weight: Tensor, scale_logits: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """[rows, columns] in the weight's dtype, contiguous and owned by the caller."""
    logits = hidden @ weight.t()
    return logits if scale_logits is None else scale_logits(logits)
