"""Bring together what tensor-parallel ranks computed, and keep them from disagreeing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_slm.loss.softmax import raise_maximum


def same_on_ranks(losses: Tensor, group: ProcessGroup) -> Tensor:
    """Broadcast losses in place from the first rank of a group, and return them.

    Ranks whose losses differed by a bit could select, and train on, different tokens.
    """
    if group.size() > 1:
        torch.distributed.broadcast(losses, group=group, group_src=0)
    return losses


def sums_over_ranks(
    sums: Tensor, maximum: Tensor, whole: Tensor, top: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Extend the sums, in place, to the columns of all ranks.

    Args:
        sums: this rank's sums without padding, as in softmax.add_chunk.
        maximum: this rank's maximum without padding.
        whole: its sums with padding; `sums` itself if there is none.
        top: its maximum with padding; `maximum` itself if there is none.
        group: the tensor-parallel ranks.

    Returns:
        The maxima over all ranks, without and with padding.
    """
    padded = whole is not sums
    highest = torch.stack([maximum, top] if padded else [maximum])
    torch.distributed.all_reduce(highest, ReduceOp.MAX, group=group)
    raise_maximum(maximum, highest[0], sums)
    # These are reduced by themselves, since they have to be the same in every pass: the order in
    # which ranks are added up depends on a tensor's size.
    torch.distributed.all_reduce(sums[:2], group=group)
    if sums.shape[0] == 3:
        torch.distributed.all_reduce(sums[2], group=group)
    if padded:
        raise_maximum(top, highest[1], whole)
        torch.distributed.all_reduce(whole[1], group=group)
    return highest[0], highest[-1]
