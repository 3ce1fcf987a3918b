"""Let Megatron's HybridModel take an `output_processor`, as GPTModel does.

The parameter is how the selective head gets the last hidden states.  HybridModel does not have it
in megatron-core 0.19, but its forward pass returns the last hidden states on a pipeline stage that
is not the last.  So the last one is passed as if it were not, and the processor is called with the
result, and with what GPTModel would give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

PARAMETER = "output_processor"


def take_output_processor(*chunks: torch.nn.Module) -> None:
    """Give the forward pass of a HybridModel the parameters `output_processor` and
    `output_processor_context`, unless it has them.  Other models are left as they are.

    Args:
        chunks: a rank's model, or its model chunks, with Megatron's wrappers or without.
    """
    for chunk in chunks:
        inner: Any = chunk
        while isinstance(inner, torch.nn.Module) and not isinstance(inner, HybridModel):
            inner = getattr(inner, "module", None)
        if (
            isinstance(inner, HybridModel)
            and PARAMETER not in inspect.signature(inner.forward).parameters
        ):
            inner.forward = partial(_forward, inner, inner.forward)


def _forward(
    model: HybridModel,
    plain: Callable[..., Any],
    *args: Any,
    labels: Tensor | None = None,
    output_processor: Callable[..., Any] | None = None,
    output_processor_context: Any = None,
    **inputs: Any,
) -> Any:
    """Pass a micro-batch, and return what the processor returns, if there is one.

    Args:
        model: the model.
        plain: its own forward pass.
        args: arguments of that pass.
        labels: the labels, [b, s/c].
        output_processor: what GPTModel's forward pass takes by that name.
        output_processor_context: handed on to the processor.
        inputs: more arguments of the forward pass.
    """
    if output_processor is None or not model.post_process:
        return plain(*args, labels=labels, **inputs)
    model.post_process = False
    try:
        hidden = plain(*args, labels=labels, **inputs)
    finally:
        model.post_process = True
    tied = model.share_embeddings_and_output_weights
    return output_processor(
        hidden_states=hidden,
        output_layer=model.output_layer,
        output_weight=model.shared_embedding_or_output_weight() if tied else None,
        labels=labels,
        context=output_processor_context,
        compute_language_model_loss=model.compute_language_model_loss,
        scale_logits=model._scale_logits,
        config=model.config,
    )
