"""Follow --step-batch-size-schedule through a run, as Megatron leaves undone.

Megatron asks for --train-iters batches of one micro-batch a rank, and then runs out of samples.
And it looks at a batch's size when its turn comes, which may be after days of training.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_slm.errors import UserError


def largest_batch(args: Namespace) -> int:
    """Return the samples of the run's largest batch.

    Args:
        args: the arguments after Megatron's validation.
    """
    if args.step_batch_size_schedule is None:
        return int(args.global_batch_size)
    return max(size for _, size in _schedule(args))


def length_of_training(args: Namespace) -> tuple[int, int]:
    """Return how many iterations the run has, and how many samples it trains on.

    Args:
        args: the arguments after Megatron's validation.
    """
    if args.step_batch_size_schedule is None:
        samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
        return args.train_iters or samples // args.global_batch_size, samples
    sizes = [size for _, size in _batches(args)]
    return len(sizes), sum(sizes)


def check_batch_sizes(args: Namespace) -> None:
    """Check the batches of the schedule that are still to come.

    Args:
        args: the arguments after Megatron's validation and after a checkpoint was loaded.

    Raises:
        UserError: the run could not train on one of them.
    """
    stages, group = args.pipeline_model_parallel_size, args.microbatch_group_size_per_vp_stage
    virtual = args.virtual_pipeline_model_parallel_size and group in (None, stages)
    unit = args.micro_batch_size * args.data_parallel_size * (stages if virtual else 1)
    for start, size in _batches(args):
        if start >= args.consumed_train_samples and size % unit:
            raise UserError(
                f"--step-batch-size-schedule {args.step_batch_size_schedule}: a batch of {size} "
                f"samples is not a multiple of {unit} (--micro-batch-size {args.micro_batch_size} "
                f"x data-parallel ranks{' x pipeline stages' if virtual else ''})"
            )


def _batches(args: Namespace) -> Iterator[tuple[int, int]]:
    """Yield how many samples come before each batch of the schedule, and its size."""
    schedule, samples, number = _schedule(args), 0, 0
    while samples < args.train_samples if args.train_samples else number < (args.train_iters or 0):
        size = [size for start, size in schedule if start <= samples][-1]
        yield samples, size
        samples, number = samples + size, number + 1


def _schedule(args: Namespace) -> list[tuple[int, int]]:
    """Return the samples from which each batch size holds, and that size."""
    return StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        decrease_batch_size_if_needed=False,
        rank=args.rank,
        schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    ).schedule
