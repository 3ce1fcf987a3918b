"""Megatron's forward step: one micro-batch through the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_slm.loss import loss_of_selected
from megatron_slm.training.micro_batch import MicroBatch, model_inputs
from megatron_slm.training.objective import MicroBatchObjective, SelectiveSettings


def make_forward_step(
    settings: SelectiveSettings,
) -> Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, MicroBatchObjective]]:
    """A `forward_step_func` whose data iterator yields MicroBatch, as seam.py provides."""

    def forward_step(
        data_iterator: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, MicroBatchObjective]:
        micro_batch = next(data_iterator)
        objective = MicroBatchObjective(micro_batch, settings, training=model.training)
        extra: dict[str, Any] = {}
        if settings.head == "chunked" and get_attr_wrapped_model(model, "post_process"):
            extra = {
                "output_processor": loss_of_selected,
                "output_processor_context": objective.select,
            }
        return model(**model_inputs(micro_batch), **extra), objective

    return forward_step
