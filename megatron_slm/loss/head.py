"""Losses in the place of GPTModel's own (`output_processor`): to be scored by, and to be trained.

GPTModel hands over the last hidden states instead of computing logits.  For the chunked head this
module does with them what ColumnParallelLinear would: gather over sequence-parallel ranks, wait for
overlapped parameter gathers, use the tied weight, say where gradients are summed; chunked.py does
the arithmetic.  The dense head is Megatron's output layer and loss.

The loss that is trained has the vocabulary's padding in its softmax, as in Megatron; the losses
that tokens are scored by have not.  A score compares losses of one head, which of one model are the
same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.loss.chunked import selected_loss, token_losses


@dataclass(frozen=True)
class Scoring:
    """Context of `all_losses`.

    vocabulary: its size without padding.
    entropies: whether they are wanted too.
    dense: whether losses are compared with those of the dense head.
    """

    vocabulary: int
    entropies: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Selecting:
    """Context of `loss_of_selected`.

    weigh: called with the losses of all tokens, their entropies (None unless wanted), and the
        losses with padding in the softmax, each float32 [b, s]; returns how much each token
        counts, float32 [b, s], or which, bool [b, s].
    vocabulary: its size without padding; None if there is no need to tell padding from it.
    most: no more tokens than this count, the same on all tensor-parallel ranks; so many rows are
        then computed.  None where it is not known, and the host waits to hear how many there are.
    """

    weigh: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    vocabulary: int | None = None
    entropies: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Telling:
    """Context of `dense_losses`.

    tell: called with the losses without padding, float32 [b, s].
    vocabulary: its size without padding.
    """

    tell: Callable[[Tensor], None]
    vocabulary: int


def all_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    context: Scoring,
    **_: Any,
) -> Tensor:
    """Losses of all tokens, float32 [b, s], in nats, without gradient; with entropies, both as
    [2, b, s].  An output processor."""
    if context.dense:
        logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
        losses = _without_padding(
            logits, labels, context.vocabulary, output_layer.tp_group, compute_language_model_loss
        )
        if not context.entropies:
            return losses
    hidden, weight = _inputs(hidden_states, output_layer, output_weight)
    scored = token_losses(
        hidden.flatten(0, 1),
        weight,
        labels.t().flatten(),
        output_layer.tp_group,
        scale_logits=scale_logits if config.use_mup else None,
        vocabulary=context.vocabulary,
        entropies=context.entropies,
    )
    if not context.dense:
        losses = _sample_by_sample(scored.losses, hidden)
    if scored.entropies is None:
        return losses
    return torch.stack([losses, _sample_by_sample(scored.entropies, hidden)])


def loss_of_selected(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    context: Selecting,
    **_: Any,
) -> Tensor:
    """Weighted sum of the losses of tokens that count, float32 0-dim, differentiable.  An output
    processor."""
    hidden, weight = _inputs(hidden_states, output_layer, output_weight)
    rows, row_labels = hidden.flatten(0, 1), labels.t().flatten()
    group = output_layer.tp_group
    scale = scale_logits if config.use_mup else None
    scored = token_losses(
        rows.detach(),
        weight.detach(),
        row_labels,
        group,
        scale_logits=scale,
        vocabulary=context.vocabulary,
        with_padding=True,
        entropies=context.entropies,
    )
    entropies = scored.entropies
    counting = context.weigh(
        _sample_by_sample(scored.losses, hidden),
        None if entropies is None else _sample_by_sample(entropies, hidden),
        _sample_by_sample(scored.trained, hidden),
    )
    weights = counting.t().flatten()
    index = _rows_that_count(weights, context.most)
    all_count = weights.dtype == torch.bool and context.most is None
    return selected_loss(
        rows,
        weight,
        row_labels,
        scored,
        index,
        group,
        weights=None if all_count else weights[index].float(),
        reduce_hidden_gradient=not output_layer.sequence_parallel,
        scale_logits=scale,
        accumulate_into_main_grad=output_layer.gradient_accumulation_fusion,
    )


def _rows_that_count(weights: Tensor, most: int | None) -> Tensor:
    """Return the rows whose weights, [n], are not 0, in order; then others, up to `most`."""
    if most is None:
        return weights.nonzero().squeeze(1)
    return (weights == 0).argsort(stable=True)[:most]


def dense_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    context: Telling,
    **_: Any,
) -> Tensor:
    """Losses of all tokens, [b, s], as GPTModel itself returns them, padding in the softmax.  An
    output processor."""
    logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
    # Before Megatron's loss, which overwrites logits.
    context.tell(
        _without_padding(
            logits.detach().clone(),
            labels,
            context.vocabulary,
            output_layer.tp_group,
            compute_language_model_loss,
        )
    )
    return compute_language_model_loss(labels, logits)


def same_on_ranks(losses: Tensor, group: ProcessGroup) -> Tensor:
    """Ranks that disagreed on a bit would train on different tokens."""
    if group.size() > 1:
        torch.distributed.broadcast(losses, group=group, group_src=0)
    return losses


@torch.no_grad()
def _without_padding(
    logits: Tensor,
    labels: Tensor,
    vocabulary: int,
    group: ProcessGroup,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Megatron's losses of logits [s, b, v/t], which are overwritten, as if there was no padding,
    float32 [b, s]."""
    padding = max(0, vocabulary - group.rank() * logits.shape[-1])
    # Of probability 0, and finite where a rank has nothing else.
    logits[..., padding:] = torch.finfo(logits.dtype).min
    return same_on_ranks(loss(labels, logits).float(), group)


def _sample_by_sample(values: Tensor, hidden: Tensor) -> Tensor:
    """[s * b] in the order of hidden states [s, b, h] -> [b, s], as labels and masks are."""
    return values.view(hidden.shape[:2]).t().contiguous()


def _inputs(
    hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden states [s, b, h] of the whole sequence, and the output layer's weight [v/t, h]."""
    hidden = hidden_states
    if output_layer.sequence_parallel:
        # The backward is a reduce-scatter: it sums over the ranks, each of which sees v/t columns.
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=output_layer.tp_group
        )
    # With overlapped parameter gathers DDP waits for a layer's weights in its forward pre-hook,
    # which only calling the layer would run.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, (hidden,))
    return hidden, output_layer.weight if output_weight is None else output_weight
