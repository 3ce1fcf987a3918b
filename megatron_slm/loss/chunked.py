"""Vocab-parallel cross entropy in chunks: losses of all tokens, then gradients of the selected.

    token_losses    for each chunk of columns: logits = h W^T; update max, sum exp, target (no grad)
                    then one all-reduce MAX [n] and one SUM [2, n] over TP give losses [n]
    (selection)     chooses k of the n rows, perhaps with weights, 0 for rows that do not count
    selected_loss   forward: sum of the losses already known; nothing is recomputed
                    backward, for each chunk of columns, k rows: logits again, softmax - one-hot,
                    dh += dlogits W, and this chunk's rows of dW = dlogits^T h

No [n, v/t] tensor exists: logits are computed for one chunk of the vocabulary at a time.  A chunk
has all rows, so its products are large, and its part of dW is complete without an accumulator.  For
n tokens, k selected, h hidden, v padded vocabulary, t tensor-parallel size and e bytes per weight,
compared with Megatron's dense head:

                     this head                          dense head
    FLOPs            (2n + 6k) h v/t                     6n h v/t
    logits, bytes    one chunk: 16 MiB (GPU 64) of       [n, v/t]: float32 softmax, and in bf16
                     float32, or 4 KiB a row if more     the e-byte logits or their gradient
    kept for bwd     k h e + 24 k (28 k with weights)    n h e (or /t with SP) + the softmax
    TP collectives   fwd MAX [n], SUM [2, n], bcast [n]  fwd MAX, SUM, SUM of [n]
                     bwd SUM [k, h]                      bwd SUM [n, h]

With sequence parallelism, the caller gathers hidden states (and reduce-scatters their gradient);
the dense head gathers them twice.  Entropies cost one more SUM [n] and one more row of the
broadcast, and token_losses then holds two chunks of logits; entropies among the 20 likeliest tokens
cost a top-20 of each chunk, an all-gather of [n, 20] and one more row of the broadcast.  On a GPU,
softmax_triton.py passes over a chunk's logits once in token_losses and once in the backward, and
the products that add up to dh leave the matrix units in float32.  Elsewhere softmax.py does the
same in plain torch, and each product is written before it is added.

A model's vocabulary is padded to suit its tensor-parallel size.  Megatron trains with padding in
the softmax, but tokens are scored without it.  Chunks of padding come last and are added to a copy
of the sums, so that the losses to score by are bit for bit those of a pass without padding.  This
costs one more row of MAX and of the broadcast, and one more SUM [n]; nothing if there is no
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.kernels import triton_kernels
from megatron_slm.loss import softmax
from megatron_slm.loss.likeliest import LikeliestTokens
from megatron_slm.loss.ranks import same_on_ranks, sums_over_ranks
from megatron_slm.loss.weight_gradient import WeightGradient, add_product

# On a CPU a chunk fits into the cache; a GPU is better off with fewer and larger kernels.  Products
# of fewer than MIN_COLUMNS columns are slow on both.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}
MIN_COLUMNS = 1024


@dataclass(frozen=True)
class TokenLosses:
    """Losses of all tokens, and what the backward needs of their softmax, each float32 [n].

    Losses and entropies are the same, bit for bit, on every tensor-parallel rank.
    """

    losses: Tensor
    """Losses in nats, with a softmax without padding."""
    trained: Tensor
    """Losses in nats, with padding in the softmax if that was asked for, else without."""
    maximum: Tensor
    """Maximum of the logits in the softmax of `trained`, exp(logits - maximum) / sum_exp."""
    sum_exp: Tensor
    """The sum in that softmax."""
    entropies: Tensor | None = None
    """Entropies in nats of the softmax without padding; None if they were not asked for."""
    top_entropies: Tensor | None = None
    """Entropies in nats of the softmax of the 20 likeliest tokens, which are no padding; None if
    they were not asked for."""


def chunk_columns(rows: int, device: str) -> int:
    """Return the columns of a chunk, a multiple of 64, whose float32 logits fill CHUNK_BYTES."""
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
    top_entropies: bool = False,
) -> TokenLosses:
    """Compute the loss -log P(label) of every token, without gradient.

    The softmax is summed online: if a chunk of the vocabulary raises a row's maximum, the sums so
    far are rescaled to the new maximum.

    Args:
        hidden: hidden states, [n, h], the same on every rank of tp_group.
        weight: this rank's rows of the output layer, [v/t, h].
        labels: the tokens to predict, int64 [n], in [0, v).
        tp_group: the tensor-parallel ranks.
        scale_logits: applied to logits, as GPTModel does with MuP.
        vocabulary: size of the vocabulary, without padding; None if it has none.
        with_padding: also compute the losses with padding in the softmax.
        entropies: also compute the entropy -sum P log P of every token's softmax.
        top_entropies: also compute that of the softmax of the 20 likeliest tokens alone.
    """
    rank, size = tp_group.rank(), tp_group.size()
    columns_here = weight.shape[0]
    start = rank * columns_here
    vocabulary = size * columns_here if vocabulary is None else vocabulary
    padding = max(0, min(columns_here, vocabulary - start))  # the column at which it begins
    padded = with_padding and vocabulary < size * columns_here
    rows = hidden.shape[0]
    functions = softmax_functions(hidden.device)
    likeliest = LikeliestTokens(rows, hidden.device) if top_entropies else None

    @torch.no_grad()
    def add(sums: Tensor, maximum: Tensor, first: int, last: int) -> Tensor:
        for columns in _chunks(rows, hidden.device.type, first, last):
            logits = _logits(hidden, weight[columns], scale_logits)
            if likeliest is not None and columns.stop <= padding:
                likeliest.add(logits)  # first, since add_chunk may overwrite them
            maximum = functions.add_chunk(sums, maximum, logits, labels, start + columns.start)
        return maximum

    sums = hidden.new_zeros((3 if entropies else 2, rows), dtype=torch.float32)
    # Lower than any logit, but finite, so that the difference of two maxima is a number.
    lowest = hidden.new_full((rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
    maximum = top = add(sums, lowest, 0, padding)
    whole = sums
    if padded:
        whole = sums[:2].clone()
        top = add(whole, maximum.clone(), padding, columns_here)
    if size > 1:
        maximum, top = sums_over_ranks(sums, maximum, whole, top, tp_group)
    log_sum = torch.log(sums[1])
    results = [log_sum - (sums[0] - maximum)]
    if padded:
        results.append(torch.log(whole[1]) - (sums[0] - top))
    if entropies:
        results.append(log_sum - sums[2] / sums[1])
    if likeliest is not None:
        results.append(likeliest.entropies(tp_group))
    result = same_on_ranks(torch.stack(results), tp_group)
    return TokenLosses(
        losses=result[0],
        trained=result[1 if padded else 0],
        maximum=top,
        sum_exp=whole[1],
        entropies=result[1 + padded] if entropies else None,
        top_entropies=result[-1] if top_entropies else None,
    )


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
    """Sum the losses to train on at `index`, float32 0-dim, differentiable in hidden and weight.

    An empty index gives a zero that still has a graph.  Under pipeline parallelism, a last stage
    without a gradient to send back would leave the others waiting.

    Args:
        hidden: hidden states, [n, h], the same on every rank of tp_group.
        weight: this rank's rows of the output layer, [v/t, h].
        labels: the tokens to predict, int64 [n].
        scored: what token_losses returned for them.
        index: the rows of `hidden` to sum, int64 [k].
        tp_group: the tensor-parallel ranks.
        weights: factors of these rows' losses, float32 [k]; None if all are 1.
        reduce_hidden_gradient: sum the hidden gradient over tp_group.  It is needed with TP without
            SP; with SP, the backward of the caller's gather does it.
        scale_logits: as for token_losses.
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
                # dh is complete: sum it over ranks while the last rows of dW are computed.
                grad_selected = grad_selected.to(hidden.dtype)
                if ctx.reduce_hidden_gradient:
                    pending = torch.distributed.all_reduce(
                        grad_selected, group=ctx.tp_group, async_op=True
                    )
            weight_gradient.set(columns, gradient, hidden)
            del gradient  # before the next chunk's logits are allocated
        grad_hidden = hidden.new_zeros(ctx.hidden_shape)
        if pending is not None:
            pending.wait()
        grad_hidden.index_copy_(0, index, grad_selected)
        return grad_hidden, weight_gradient.result(), *[None] * 8


def _chunks(rows: int, device: str, first: int, last: int) -> Iterator[slice]:
    """Cut the columns [first, last) into consecutive chunks."""
    step = chunk_columns(rows, device)
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def _logits(
    hidden: Tensor, weight: Tensor, scale_logits: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Compute logits, [rows, columns], in the weight's dtype, contiguous and the caller's own."""
    logits = hidden @ weight.t()
    return logits if scale_logits is None else scale_logits(logits)
