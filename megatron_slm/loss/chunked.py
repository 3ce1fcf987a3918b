"""Vocab-parallel cross entropy in chunks: all losses first, gradients for the selected only.

    token_losses    for chunk of rows: logits = h W^T; keep max, sum exp, target logit     (no grad)
                    then one all-reduce MAX [n] and one SUM [2, n] over TP make losses [n]
    (selection)     k of the n rows
    selected_loss   forward: sum of the losses already known, nothing is recomputed
                    backward, for chunk of the k rows: logits again, softmax - one-hot,
                    dh = dlogits W (all-reduced over TP while dW is computed), dW += dlogits^T h

No [n, v/t] tensor exists; logits live one chunk at a time.  n tokens, k selected, h hidden,
v padded vocabulary, t tensor-parallel size, e bytes per weight; against Megatron's dense head:

                     this head                          dense head
    FLOPs            (2n + 6k) h v/t                     6n h v/t
    logits, bytes    one chunk, <= 64 MiB in float32     2 [n, v/t]: e-byte logits, float32 softmax
    kept for bwd     k h e + 12 k                        n h e (or /t with SP) + the softmax
    TP collectives   fwd MAX [n], SUM [2, n], bcast [n]  fwd MAX, SUM, SUM of [n]
                     bwd SUM [k, h]                      bwd SUM [n, h] (SP: reduce-scatter both)

With sequence parallelism the caller gathers hidden states (and its backward reduce-scatters).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenLosses:
    """Losses and the softmax statistics that the backward needs, each float32 [n].

    losses: nats, the same bits on every tensor-parallel rank.
    maximum, sum_exp: over the whole vocabulary, so softmax = exp(logits - maximum) / sum_exp.
    """

    losses: Tensor
    maximum: Tensor
    sum_exp: Tensor


def chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits over `vocabulary` local columns fill CHUNK_BYTES."""
    return max(64, CHUNK_BYTES // (4 * max(1, vocabulary)))


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: ProcessGroup,
    *,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    vocabulary: int | None = None,
) -> TokenLosses:
    """-log P(label) of every token, without gradient.

    Args:
        hidden: [n, h], the same on every rank of tp_group.
        weight: [v/t, h], this rank's rows of the output layer.
        labels: int64 [n], in [0, v).
        scale_logits: applied to logits, as GPTModel does with MuP.
        vocabulary: columns from here on are left out of the softmax.  A model's vocabulary is
            padded to suit its tensor-parallel size; without this the padding is part of P.
    """
    rank, size = tp_group.rank(), tp_group.size()
    start = rank * weight.shape[0]
    if vocabulary is not None:
        weight = weight[: max(0, min(weight.shape[0], vocabulary - start))]
    rows = hidden.shape[0]
    maximum = hidden.new_full((rows,), -torch.inf, dtype=torch.float32)
    sum_exp_and_target = hidden.new_zeros((2, rows), dtype=torch.float32)
    if weight.shape[0] > 0:
        with torch.no_grad():
            step = chunk_rows(weight.shape[0])
            for begin in range(0, rows, step):
                chunk = slice(begin, begin + step)
                logits = _logits(hidden[chunk], weight, scale_logits)
                column, here = _local_columns(labels[chunk], start, weight.shape[0])
                maximum[chunk] = logits.amax(-1)
                target = logits.gather(-1, column[:, None]).squeeze(-1)
                logits.sub_(maximum[chunk, None]).exp_()
                sum_exp_and_target[0, chunk] = logits.sum(-1)
                sum_exp_and_target[1, chunk] = torch.where(here, target, 0.0)
    if size > 1:
        local_maximum = maximum.clone()
        torch.distributed.all_reduce(maximum, ReduceOp.MAX, group=tp_group)
        sum_exp_and_target[0] *= torch.exp(local_maximum - maximum)
        torch.distributed.all_reduce(sum_exp_and_target, group=tp_group)
    sum_exp, target = sum_exp_and_target
    losses = torch.log(sum_exp) - (target - maximum)
    if size > 1:
        # Ranks that disagreed on a bit would select, and train on, different tokens.
        torch.distributed.broadcast(losses, group=tp_group, group_src=0)
    return TokenLosses(losses, maximum, sum_exp)


def selected_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scored: TokenLosses,
    index: Tensor,
    tp_group: ProcessGroup,
    *,
    reduce_hidden_gradient: bool,
    scale_logits: Callable[[Tensor], Tensor] | None = None,
    accumulate_into_main_grad: bool = False,
) -> Tensor:
    """Sum of the losses at `index`, float32 0-dim, differentiable in hidden and weight.

    An empty index gives a zero that still carries the graph: under pipeline parallelism a last
    stage without a gradient to send back would leave the others waiting.

    Args:
        index: int64 [k], rows of hidden.
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
        )
        ctx.hidden_shape = hidden.shape
        ctx.tp_group = tp_group
        ctx.reduce_hidden_gradient = reduce_hidden_gradient
        ctx.scale_logits = scale_logits
        ctx.accumulate_into_main_grad = accumulate_into_main_grad
        return scored.losses[index].sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        hidden, weight, labels, maximum, sum_exp, index = ctx.saved_tensors
        start = ctx.tp_group.rank() * weight.shape[0]
        scale = grad_output.float()
        if ctx.scale_logits is not None:
            scale = scale * ctx.scale_logits(torch.ones_like(scale))
        grad_hidden = hidden.new_zeros(ctx.hidden_shape)
        grad_selected = torch.empty_like(hidden)
        weight_gradient = _WeightGradient(weight, ctx.accumulate_into_main_grad)
        pending = []
        step = chunk_rows(weight.shape[0])
        for begin in range(0, hidden.shape[0], step):
            chunk = slice(begin, begin + step)
            logits = _logits(hidden[chunk], weight, ctx.scale_logits)
            gradient = logits.sub_(maximum[chunk, None]).exp_().div_(sum_exp[chunk, None])
            column, here = _local_columns(labels[chunk], start, weight.shape[0])
            gradient.scatter_add_(-1, column[:, None], -here[:, None].to(gradient.dtype))
            gradient = gradient.mul_(scale).to(weight.dtype)
            torch.mm(gradient, weight, out=grad_selected[chunk])
            if ctx.reduce_hidden_gradient:
                pending.append(
                    torch.distributed.all_reduce(
                        grad_selected[chunk], group=ctx.tp_group, async_op=True
                    )
                )
            weight_gradient.add(gradient, hidden[chunk])
        for work in pending:
            work.wait()
        grad_hidden.index_copy_(0, index, grad_selected)
        return grad_hidden, weight_gradient.result(), None, None, None, None, None, None, None


class _WeightGradient:
    """dW = sum over chunks of dlogits^T h, in float32 where the weight is narrower."""

    def __init__(self, weight: Tensor, accumulate_into_main_grad: bool) -> None:
        self.weight = weight
        self.fused = accumulate_into_main_grad and weight.requires_grad
        self.total: Tensor | None = None
        if self.fused:
            self.total = weight.main_grad
        elif weight.requires_grad:
            self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.total is None:
            return
        if gradient.dtype == self.total.dtype:
            self.total.addmm_(gradient.t(), hidden)
        else:
            self.total.add_(gradient.t() @ hidden)

    def result(self) -> Tensor | None:
        if self.total is None:
            return None
        if not self.fused:
            return self.total.to(self.weight.dtype)
        # As in Megatron's fused linear: the DDP hook must run, and must not add this tensor, unless
        # the weight is tied and the hook expects a zero to add.
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)


def _logits(
    hidden: Tensor, weight: Tensor, scale_logits: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """float32 [rows, v/t], owned by the caller.  The product itself runs in the weight's dtype."""
    logits = hidden @ weight.t()
    if scale_logits is not None:
        logits = scale_logits(logits)
    return logits.float()


def _local_columns(labels: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each label within this rank's slice (0 where it lies elsewhere), and whether it
    lies here."""
    column = labels - start
    here = (column >= 0) & (column < columns)
    return torch.where(here, column, 0), here
