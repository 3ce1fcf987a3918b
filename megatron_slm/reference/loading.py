"""Load and save a rank's parts of a reference's checkpoint as Megatron does the policy's."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed import ProcessGroup


def load_parts(parts: dict[str, Any], directory: Path, arguments: Namespace) -> dict[str, Any]:
    """Load this rank's parts of a checkpoint.  Collective over all ranks.

    With --ckpt-fully-parallel-load, ranks that need the same part share out the reading, and send
    each other what they have read.

    Args:
        parts: the sharded state dict to load.
        directory: the torch_dist checkpoint of one iteration.
        arguments: Megatron's arguments.
    """
    strategy = TorchDistLoadShardedStrategy()
    if arguments.ckpt_fully_parallel_load:
        strategy = FullyParallelLoadStrategyWrapper(
            strategy,
            _group(arguments.ckpt_fully_parallel_load_process_group),
            exchange_algo=arguments.ckpt_fully_parallel_load_exchange_algo,
        )
    loaded: dict[str, Any] = dist_checkpointing.load(parts, str(directory), strategy)
    return loaded


def save_parts(state: dict[str, Any], directory: Path, arguments: Namespace) -> None:
    """Save this rank's parts of a checkpoint.  Collective over all ranks.

    Unless --no-ckpt-fully-parallel-save is given, ranks that have the same part share out the
    writing.

    Args:
        state: the sharded state dict to save.
        directory: the directory of one iteration, which exists.
        arguments: Megatron's arguments.
    """
    strategy = TorchDistSaveShardedStrategy()
    if arguments.ckpt_fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(
            strategy, _group(arguments.ckpt_fully_parallel_save_process_group)
        )
    dist_checkpointing.save(state, str(directory), strategy)


def _group(name: str) -> ProcessGroup:
    """Return the ranks that share out reading or writing: `dp`, or `ep_dp`."""
    group: ProcessGroup = (
        mpu.get_data_parallel_group(with_context_parallel=True)
        if name == "dp"
        else mpu.get_expert_data_parallel_group()
    )
    return group
