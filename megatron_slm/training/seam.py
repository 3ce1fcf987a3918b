"""The one place where a step of ours differs from Megatron's: before the schedule starts.

train() and evaluate() look a schedule up and call it once a step, on every pipeline rank alike.
The schedule is wrapped so that what has to come first (the reference's pass, the ranking of a
whole step) comes first, as passes of their own, and then the policy's schedule runs on the
micro-batches read for them.  (Started from within a forward step, another pass would wait for
pipeline stages that wait for this one.)  What Megatron checks and replays, the data iterator it
hands over, stays untouched.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from megatron.core import mpu
from megatron.training import get_args, training

from megatron_slm.model.layer_spec import extra_states
from megatron_slm.training.micro_batch import MicroBatch
from megatron_slm.training.nan import check_weights


def install(
    run_step: Callable[..., Any],
    before_save: Callable[[int], None],
    after_training: Callable[[int], None],
) -> None:
    """Wrap Megatron's schedules, checkpoints and training loop.  Call once, before `pretrain()`.

    Args:
        run_step: called as run_step(schedule, **arguments of the schedule) in the schedule's place.
        before_save: called with the iteration before a checkpoint is written.
        after_training: called with the iteration when the training loop has come to its end, also
            by a signal, --exit-interval or --exit-duration-in-mins.
    """
    get_schedule = training.get_forward_backward_func
    save_checkpoint = training.save_checkpoint
    train = training.train

    @functools.wraps(save_checkpoint)
    def save(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        check_weights(model, iteration)
        with _sigterm_later(), extra_states(model):
            before_save(iteration)
            return save_checkpoint(iteration, model, *args, **kwargs)

    training.save_checkpoint = save

    @functools.wraps(train)
    def train_and_finish(*args: Any, **kwargs: Any) -> Any:
        try:
            iteration, operations = train(*args, **kwargs)
        except SystemExit as left:
            if not left.code:  # after a whole step, on all ranks alike
                after_training(get_args().curr_iteration + 1)
            raise
        after_training(iteration)
        return iteration, operations

    training.train = train_and_finish

    @functools.wraps(get_schedule)
    def get_wrapped_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(run_step, get_schedule(*args, **kwargs))

    training.get_forward_backward_func = get_wrapped_schedule


@contextmanager
def _sigterm_later() -> Iterator[None]:
    """Keep SIGTERM from this thread, and for good from processes that it starts: at the first save
    Megatron starts some that it writes by, and a SIGTERM to all would end them before the last."""
    resource_tracker.ensure_running()  # which would let the signal through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def own_iterator(data_iterator: Any) -> Any:
    """The iterator this pipeline stage reads: with virtual stages there is one per model chunk, of
    which the first reads on the first stage, the last on the last."""
    if not isinstance(data_iterator, list):
        return data_iterator
    return data_iterator[0 if mpu.is_pipeline_first_stage() else -1]


def form_of(data_iterator: Any) -> list[None] | None:
    """What for_model_chunks needs of an iterator.  Whoever kept the iterator itself would keep its
    loader from ending its workers when training ends."""
    return [None] * len(data_iterator) if isinstance(data_iterator, list) else None


def for_model_chunks(
    form: list[None] | None, micro_batches: Iterator[MicroBatch], count: int
) -> Iterator[MicroBatch] | list[Iterator[MicroBatch]]:
    """Micro-batches in the form of a step's data iterator: one for each model chunk, of which those
    that read none get empty ones."""
    if form is None:
        return micro_batches
    chunks: list[Iterator[MicroBatch]] = [
        (MicroBatch(number) for number in range(count)) for _ in form
    ]
    chunks[0 if mpu.is_pipeline_first_stage() else -1] = micro_batches
    return chunks
