"""Chunked losses in the place of GPTModel's output layer (`output_processor`).

GPTModel hands over the last hidden states instead of computing logits.  This module does for them
what ColumnParallelLinear would: gather over sequence-parallel ranks, wait for overlapped parameter
gathers, use the tied weight, say where gradients are summed.  chunked.py does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_slm.loss.chunked import selected_loss, token_losses


@dataclass(frozen=True)
class Scoring:
    """Context of `all_losses`.

    vocabulary: its size without padding, to leave padding out of the softmax; None to keep it in.
    entropies: whether they are wanted too.
    """

    vocabulary: int | None = None
    entropies: bool = False


@dataclass(frozen=True)
class Selecting:
    """Context of `loss_of_selected`.

    weigh: called with the losses of all tokens, and their entropies if these are wanted, each
        float32 [b, s]; returns how much each token counts, float32 [b, s], or which, bool [b, s].
    """

    weigh: Callable[..., Tensor]
    entropies: bool = False


def all_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    context: Scoring,
    **_: Any,
) -> Tensor:
    """Losses of all tokens, float32 [b, s], in nats, without gradient; with entropies, both as
    [2, b, s].  An output processor."""
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
        entropies=context.entropies,
    )
    known = [scored.losses] if scored.entropies is None else [scored.losses, scored.entropies]
    counting = context.weigh(*(_sample_by_sample(values, hidden) for values in known))
    weights = counting.t().flatten()
    index = weights.nonzero().squeeze(1)
    return selected_loss(
        rows,
        weight,
        row_labels,
        scored,
        index,
        group,
        weights=None if weights.dtype == torch.bool else weights[index],
        reduce_hidden_gradient=not output_layer.sequence_parallel,
        scale_logits=scale,
        accumulate_into_main_grad=output_layer.gradient_accumulation_fusion,
    )


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
