"""The one place where a step of ours differs from Megatron's: before the schedule starts.

train() and evaluate() look a schedule up and call it once a step, on every pipeline rank alike.
The schedule is wrapped so that, first, the reference scores all micro-batches of the step in a
forward-only pass of its own, and then the policy's schedule runs on the micro-batches read for it.
(Started from within a forward step, the reference pass would wait for pipeline stages that wait for
this one.)  What Megatron checks and replays, the data iterator it hands over, stays untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megatron.core import mpu
from megatron.training import training

from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches


class Reference(Protocol):
    """Where reference losses come from."""

    def score(
        self, micro_batches: Iterator[MicroBatch], count: int, micro_batch_size: int
    ) -> list[MicroBatch]:
        """The micro-batches of a step, with reference_losses on the last pipeline stage."""


def install(build_reference: Callable[[], Reference] | None) -> None:
    """Wrap Megatron's schedules.  Call once, before `pretrain()`.

    Args:
        build_reference: called once on all ranks, when the policy has been built and loaded and
            its training or evaluation begins.
    """
    get_schedule = training.get_forward_backward_func
    reference = functools.cache(build_reference) if build_reference is not None else None

    @functools.wraps(get_schedule)
    def get_wrapped_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        schedule = get_schedule(*args, **kwargs)
        scorer = reference() if reference is not None else None

        @functools.wraps(schedule)
        def run(
            *, data_iterator: Any, num_microbatches: int, micro_batch_size: int, **rest: Any
        ) -> Any:
            micro_batches = read_micro_batches(
                _own_iterator(data_iterator), micro_batch_size, num_microbatches
            )
            if scorer is not None:
                micro_batches = iter(
                    scorer.score(micro_batches, num_microbatches, micro_batch_size)
                )
            return schedule(
                data_iterator=_for_model_chunks(data_iterator, micro_batches, num_microbatches),
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                **rest,
            )

        return run

    training.get_forward_backward_func = get_wrapped_schedule


def _own_iterator(data_iterator: Any) -> Any:
    """The iterator this pipeline stage reads: with virtual stages there is one per model chunk, of
    which the first reads on the first stage, the last on the last."""
    if not isinstance(data_iterator, list):
        return data_iterator
    return data_iterator[0 if mpu.is_pipeline_first_stage() else -1]


def _for_model_chunks(data_iterator: Any, micro_batches: Iterator[MicroBatch], count: int) -> Any:
    """Micro-batches in the form of data_iterator; a chunk that reads none gets empty ones."""
    if not isinstance(data_iterator, list):
        return micro_batches
    chunks: list[Iterator[MicroBatch]] = [
        (MicroBatch(number) for number in range(count)) for _ in data_iterator
    ]
    chunks[0 if mpu.is_pipeline_first_stage() else -1] = micro_batches
    return chunks
