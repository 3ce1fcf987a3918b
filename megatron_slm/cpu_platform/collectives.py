"""Give gloo the collectives over parts of different sizes that experts need.

Megatron's dispatcher sends each rank as many tokens as were routed to its experts.  NCCL takes the
sizes as tensors on the host or as arrays, and gathers and scatters parts of different sizes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, distributed


def install() -> None:
    """Replace three of torch's collectives.  Called once, by the package."""
    all_to_all_single = distributed.all_to_all_single
    all_gather = distributed.all_gather

    @functools.wraps(all_to_all_single)
    def all_to_all_by_numbers(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sizes = [_numbers(each) for each in (output_split_sizes, input_split_sizes)]
        return all_to_all_single(output, input, *sizes, *args, **kwargs)

    @functools.wraps(all_gather)
    def all_gather_of_any_size(
        tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, group, async_op)
        own = distributed.get_rank(group)
        for rank, part in enumerate(tensor_list):
            if rank == own:
                part.copy_(tensor)
            if part.numel():
                distributed.broadcast(part, group=group, group_src=rank)
        return None

    @functools.wraps(distributed.reduce_scatter)
    def reduce_scatter_of_any_size(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> None:
        own = distributed.get_rank(group)
        for rank, part in enumerate(input_list):
            total = part.clone()
            if total.numel():
                distributed.reduce(total, op=op, group=group, group_dst=rank)
            if rank == own:
                output.copy_(total)

    distributed.all_to_all_single = all_to_all_by_numbers
    distributed.all_gather = all_gather_of_any_size
    distributed.reduce_scatter = reduce_scatter_of_any_size


def _numbers(sizes: Any) -> list[int] | None:
    return None if sizes is None else torch.as_tensor(sizes).tolist()
