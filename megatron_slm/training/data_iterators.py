"""Handle a step's data iterator: a single one, or one for each model chunk of a pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee
from typing import Any

from megatron.core import mpu

from megatron_slm.training.micro_batch import MicroBatch


def own_iterator(data_iterator: Any) -> Any:
    """Return the iterator that this pipeline stage reads.

    With virtual stages there is one for each model chunk.  On the first stage it is the first one
    that reads, and on the last stage the last one.
    """
    if not isinstance(data_iterator, list):
        return data_iterator
    return data_iterator[0 if mpu.is_pipeline_first_stage() else -1]


def form_of(data_iterator: Any) -> list[None] | None:
    """Return what for_model_chunks has to know of an iterator.

    Keeping the iterator itself would keep its loader from ending its workers when training ends.
    """
    return [None] * len(data_iterator) if isinstance(data_iterator, list) else None


def for_model_chunks(
    form: list[None] | None, micro_batches: Iterator[MicroBatch]
) -> Iterator[MicroBatch] | list[Iterator[MicroBatch]]:
    """Return micro-batches in the form of a step's data iterator.

    Args:
        form: the form of the step's iterator, from form_of.
        micro_batches: what the iterator is to yield.  Of several model chunks, the others get
            micro-batches that only know where documents are.
    """
    if form is None:
        return micro_batches
    copies = tee(micro_batches, len(form))
    chunks: list[Iterator[MicroBatch]] = [
        (MicroBatch(batch.number, packed=batch.packed) for batch in copy) for copy in copies
    ]
    own = 0 if mpu.is_pipeline_first_stage() else -1
    chunks[own] = copies[own]
    return chunks
