"""Load a rank's parts of a reference's checkpoint as Megatron loads the policy's."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy


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
        group = (
            mpu.get_data_parallel_group(with_context_parallel=True)
            if arguments.ckpt_fully_parallel_load_process_group == "dp"
            else mpu.get_expert_data_parallel_group()
        )
        strategy = FullyParallelLoadStrategyWrapper(
            strategy, group, exchange_algo=arguments.ckpt_fully_parallel_load_exchange_algo
        )
    loaded: dict[str, Any] = dist_checkpointing.load(parts, str(directory), strategy)
    return loaded
