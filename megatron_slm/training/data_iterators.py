"""A step's data iterator: one, or one for each model chunk of a pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core import mpu

from megatron_slm.training.micro_batch import MicroBatch


def own_iterator(data_iterator: Any) -> Any:
    """Return the iterator this pipeline stage reads: with virtual stages there is one per model
    chunk, of which the first reads on the first stage, the last on the last."""
    if not isinstance(data_iterator, list):
        return data_iterator
    return data_iterator[0 if mpu.is_pipeline_first_stage() else -1]


def form_of(data_iterator: Any) -> list[None] | None:
    """Return what for_model_chunks needs of an iterator.  Whoever kept the iterator itself would
    keep its loader from ending its workers when training ends."""
    return [None] * len(data_iterator) if isinstance(data_iterator, list) else None


def for_model_chunks(
    form: list[None] | None, micro_batches: Iterator[MicroBatch], count: int
) -> Iterator[MicroBatch] | list[Iterator[MicroBatch]]:
    """Return micro-batches in the form of a step's data iterator: one for each model chunk, of
    which those that read none get empty ones."""
    if form is None:
        return micro_batches
    chunks: list[Iterator[MicroBatch]] = [
        (MicroBatch(number) for number in range(count)) for _ in form
    ]
    chunks[0 if mpu.is_pipeline_first_stage() else -1] = micro_batches
    return chunks
