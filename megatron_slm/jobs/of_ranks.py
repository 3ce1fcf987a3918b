"""Tell all ranks of a job what one of them has found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def of_any_rank(said: str | None) -> str | None:
    """Return the message of the lowest rank that has one.  Collective over all ranks."""
    everyone: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, said)
    return next((each for each in everyone if each is not None), None)


def from_first_rank(function: Callable[[], Any]) -> Any:
    """Call a function on the first rank, and return or raise on all ranks what it does there."""
    answer: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [function()]
        except Exception as error:
            answer = [error]
    torch.distributed.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
