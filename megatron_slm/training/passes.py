"""Run a step's schedule, and before it score micro-batches in forward-only passes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_slm.loss import Scoring, all_losses
from megatron_slm.model.documents import activation_shape, by_sample
from megatron_slm.reference import Reference
from megatron_slm.training.data_iterators import for_model_chunks
from megatron_slm.training.micro_batch import MicroBatch


def run_in_shape(schedule: Callable[..., Any], **arguments: Any) -> Any:
    """Run a schedule, and tell it the shape of what the policy's pipeline stages send each other.

    Args:
        schedule: Megatron's schedule.
        arguments: its arguments, as Megatron gives them.
    """
    length, samples = arguments["seq_length"], arguments["micro_batch_size"]
    return schedule(**arguments | activation_shape(get_args(), length, samples))


def score_with_policy(
    schedule: Callable[..., Any],
    form: list[None] | None,
    micro_batches: Iterator[MicroBatch],
    arguments: dict[str, Any],
    scoring: Scoring,
) -> tuple[list[MicroBatch], list[dict[str, Tensor]]]:
    """Score micro-batches with the policy, without gradients, random numbers or changes of state.

    Args:
        schedule: Megatron's schedule.
        form: the form of the data iterators that it takes, from form_of.
        micro_batches: the micro-batches to score.
        arguments: the schedule's other arguments in a training step.
        scoring: what to compute.

    Returns:
        The micro-batches as they were read and, on the last pipeline stage, what was computed of
        each, float32 [b, s/c] by name; on other stages an empty list.
    """
    read: list[MicroBatch] = []

    def score(
        data_iterator: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        output = model(
            **next(data_iterator).model_inputs(get_args()),
            output_processor=all_losses,
            output_processor_context=scoring,
        )
        return output, lambda scored, non_loss_data: scored

    models = arguments["model"]
    # Dropout would draw random numbers that belong to the training pass.
    for model in models:
        model.eval()
    with torch.no_grad():
        scored = schedule(
            **arguments
            | {
                "forward_step_func": score,
                "data_iterator": for_model_chunks(form, noting(micro_batches, read)),
                "forward_only": True,
                "collect_non_loss_data": True,
            }
        )
    for model in models:
        model.train()
    length = get_args().seq_length // get_args().context_parallel_size
    names = scoring.names
    scored = [by_sample(said, length) for said in scored]
    by_name = [dict(zip(names, said if len(names) > 1 else [said], strict=True)) for said in scored]
    return read, by_name


def with_reference(
    reference: Reference,
    micro_batches: Iterator[MicroBatch],
    count: int,
    micro_batch_size: int,
) -> list[MicroBatch]:
    """Read micro-batches and, on the last pipeline stage, set their reference losses.

    Args:
        reference: scores them.
        micro_batches: the micro-batches to read.
        count: how many to read.
        micro_batch_size: samples in each.
    """
    read: list[MicroBatch] = []
    scored = reference.score(noting(micro_batches, read), count, micro_batch_size)
    for batch, (losses, entropies) in zip(read, scored, strict=False):  # empty on other stages
        batch.reference_losses, batch.reference_entropies = losses, entropies
    return read


def noting(micro_batches: Iterator[MicroBatch], seen: list[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield micro-batches, and add each to `seen` as it is read."""
    for micro_batch in micro_batches:
        seen.append(micro_batch)
        yield micro_batch


def as_selector_takes(
    micro_batches: list[MicroBatch], ratio: float
) -> tuple[Tensor, float, Tensor | None, int]:
    """Return a whole step as the selector takes it: the valid tokens, the ratio, the datasets of
    samples, and the number of micro-batches.

    Args:
        micro_batches: all of the step's, on the last pipeline stage.
        ratio: the step's ratio.
    """
    domains = [batch.domains for batch in micro_batches if batch.domains is not None]
    valid = torch.cat([batch.valid for batch in micro_batches])
    return valid, ratio, torch.cat(domains) if domains else None, len(micro_batches)
