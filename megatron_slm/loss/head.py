"""Output processors for GPTModel: they compute the losses to score tokens by, and to train on.

GPTModel hands an `output_processor` its last hidden states instead of computing logits.  For the
chunked head, this module does what ColumnParallelLinear would do with them: it gathers them over
sequence-parallel ranks, waits for overlapped parameter gathers, uses the tied weight, and says
where gradients are summed.  chunked.py does the arithmetic.  The dense head is Megatron's output
layer and loss.

The softmax of the loss that is trained on includes the vocabulary's padding, as in Megatron; the
softmax of the losses that tokens are scored by does not.  A score compares losses of the same head,
which are bit for bit equal for equal models.
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
from megatron_slm.loss.ranks import same_on_ranks


@dataclass(frozen=True)
class Scoring:
    """The context of `all_losses`."""

    vocabulary: int
    """Size of the vocabulary, without padding."""
    entropies: bool = False
    """Whether to compute entropies as well."""
    top_entropies: bool = False
    """Whether to compute the entropies among the likeliest tokens as well."""
    dense: bool = False
    """Whether the losses will be compared with losses of the dense head."""

    @property
    def names(self) -> tuple[str, ...]:
        """What is computed, in the order in which it is returned."""
        more = {"entropies": self.entropies, "top_entropies": self.top_entropies}
        return ("losses", *[name for name, wanted in more.items() if wanted])


@dataclass(frozen=True)
class Selecting:
    """The context of `loss_of_selected`."""

    weigh: Callable[..., Tensor]
    """Returns how much each token counts, float32 [b, s], or which tokens count, bool [b, s].  Its
    arguments are the losses of all tokens, their entropies if wanted, and their losses with padding
    in the softmax, each float32 [b, s]; and, by name, `top_entropies` if wanted."""
    vocabulary: int | None = None
    """Size of the vocabulary, without padding; None if the two losses need not be told apart."""
    entropies: bool = False
    """Whether to compute entropies as well."""
    top_entropies: bool = False
    """Whether to compute the entropies among the likeliest tokens as well."""
    most: int | None = None
    """The most tokens that can count, the same on all tensor-parallel ranks: as many rows are
    computed.  If it is None, not known, the host waits for the device to learn how many count."""


@dataclass(frozen=True)
class Telling:
    """The context of `dense_losses`."""

    tell: Callable[[Tensor], None]
    """Receives the losses without padding in the softmax, float32 [b, s]."""
    vocabulary: int
    """Size of the vocabulary, without padding."""


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
    """Compute the losses of all tokens, without gradient.  An output processor.

    Returns:
        Losses in nats, float32 [b, s]; if more is wanted, all of `names`, float32 [names, b, s].
    """
    if context.dense:
        logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
        losses = _without_padding(
            logits, labels, context.vocabulary, output_layer.tp_group, compute_language_model_loss
        )
        if len(context.names) == 1:
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
        top_entropies=context.top_entropies,
    )
    if not context.dense:
        losses = _sample_by_sample(scored.losses, hidden)
    more = [one for one in (scored.entropies, scored.top_entropies) if one is not None]
    if not more:
        return losses
    return torch.stack([losses, *[_sample_by_sample(one, hidden) for one in more]])


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
    """Compute the weighted sum of the losses of the tokens that count.  An output processor.

    Returns:
        The sum, float32 0-dim, differentiable.
    """
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
        top_entropies=context.top_entropies,
    )
    entropies, top = scored.entropies, scored.top_entropies
    counting = context.weigh(
        _sample_by_sample(scored.losses, hidden),
        None if entropies is None else _sample_by_sample(entropies, hidden),
        _sample_by_sample(scored.trained, hidden),
        **({} if top is None else {"top_entropies": _sample_by_sample(top, hidden)}),
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
    """Return the rows whose weights, [n], are not 0, in order, filled up to `most` with others."""
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
    """Compute the losses of all tokens as GPTModel itself does, and tell those without padding.

    An output processor.

    Returns:
        Losses with padding in the softmax, [b, s].
    """
    logits = scale_logits(output_layer(hidden_states, weight=output_weight)[0])
    # This has to come first, since Megatron's loss overwrites logits.
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


@torch.no_grad()
def _without_padding(
    logits: Tensor,
    labels: Tensor,
    vocabulary: int,
    group: ProcessGroup,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute Megatron's losses as if there were no padding, float32 [b, s].

    Args:
        logits: [s, b, v/t]; overwritten.
        labels: [b, s].
        vocabulary: size of the vocabulary, without padding.
        group: the tensor-parallel ranks.
        loss: Megatron's loss of labels and logits.
    """
    padding = max(0, vocabulary - group.rank() * logits.shape[-1])
    # The probability becomes 0, and the maximum stays finite where a rank has nothing but padding.
    logits[..., padding:] = torch.finfo(logits.dtype).min
    return same_on_ranks(loss(labels, logits).float(), group)


def _sample_by_sample(values: Tensor, hidden: Tensor) -> Tensor:
    """Reorder values [s * b], which follow hidden states [s, b, h], as labels are, [b, s]."""
    return values.view(hidden.shape[:2]).t().contiguous()


def _inputs(
    hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of whole sequences, [s, b, h], and the output weight, [v/t, h]."""
    hidden = hidden_states
    if output_layer.sequence_parallel:
        # Its backward is a reduce-scatter: it sums the gradients, to which each rank's v/t columns
        # contribute.
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=output_layer.tp_group
        )
    # With overlapped parameter gathers, DDP waits for a layer's weights in the layer's forward
    # pre-hook, which would only run if the layer were called.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, (hidden,))
    return hidden, output_layer.weight if output_weight is None else output_weight
