"""Chunked losses in the place of GPTModel's output layer (`output_processor`).

GPTModel hands over the last hidden states instead of computing logits.  This module does for them
what ColumnParallelLinear would: gather over sequence-parallel ranks, wait for overlapped parameter
gathers, use the tied weight, say where gradients are summed.  chunked.py does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_slm.loss.chunked import selected_loss, token_losses


def all_losses(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    context: int | None = None,
    **_: Any,
) -> Tensor:
    """Losses of all tokens, float32 [b, s], in nats, without gradient.

    An output processor; its context is the vocabulary size without padding, to leave padding out
    of the softmax, or None.
    """
    hidden, weight = _inputs(hidden_states, output_layer, output_weight)
    scored = token_losses(
        hidden.flatten(0, 1),
        weight,
        labels.t().flatten(),
        output_layer.tp_group,
        scale_logits=scale_logits if config.use_mup else None,
        vocabulary=context,
    )
    return scored.losses.view(hidden.shape[:2]).t().contiguous()


def loss_of_selected(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
    context: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Sum of the selected tokens' losses, float32 0-dim, differentiable.

    An output processor; its context takes all losses, float32 [b, s], and returns the selected
    tokens, bool [b, s].
    """
    hidden, weight = _inputs(hidden_states, output_layer, output_weight)
    rows, row_labels = hidden.flatten(0, 1), labels.t().flatten()
    group = output_layer.tp_group
    scale = scale_logits if config.use_mup else None
    # Hidden states are [s, b, h], losses and labels [b, s]: rows are in the order of the former.
    scored = token_losses(rows.detach(), weight.detach(), row_labels, group, scale_logits=scale)
    selected = context(scored.losses.view(hidden.shape[:2]).t().contiguous())
    return selected_loss(
        rows,
        weight,
        row_labels,
        scored,
        selected.t().flatten().nonzero().squeeze(1),
        group,
        reduce_hidden_gradient=not output_layer.sequence_parallel,
        scale_logits=scale,
        accumulate_into_main_grad=output_layer.gradient_accumulation_fusion,
    )


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
