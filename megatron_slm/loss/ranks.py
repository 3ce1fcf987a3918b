"""Keep tensor-parallel ranks from disagreeing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def same_on_ranks(losses: Tensor, group: ProcessGroup) -> Tensor:
    """Broadcast losses in place from the first rank of a group, and return them.

    Ranks whose losses differed by a bit could select, and train on, different tokens.
    """
    if group.size() > 1:
        torch.distributed.broadcast(losses, group=group, group_src=0)
    return losses
