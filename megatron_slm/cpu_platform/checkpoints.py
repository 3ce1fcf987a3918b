"""Fork the process that writes asynchronous saves, and copy what it writes.

It has to be forked from this process: started afresh, it would not have the platform.  On a GPU it
first copies tensors to the host, and training waits only for that.  Here tensors are in memory that
both processes share: without a copy, training would change them while they are written.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Wrap Megatron's start of the writer and its preloading.  Called once, by the package."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import initialize

    start_writer = initialize.init_persistent_async_worker

    @functools.wraps(start_writer)
    def fork_writer(rank: int, mp_mode: str = "fork") -> None:
        start_writer(rank, "fork")

    initialize.init_persistent_async_worker = fork_writer
    preload = FileSystemWriterAsync.preload_tensors

    @functools.wraps(preload)
    def preload_copies(*args: Any, **kwargs: Any) -> list[Any]:
        return [
            (file, key, (objects, [(item, _own(tensor)) for item, tensor in tensors]))
            for file, key, (objects, tensors) in preload(*args, **kwargs)
        ]

    FileSystemWriterAsync.preload_tensors = staticmethod(preload_copies)


def _own(tensor: Any) -> Any:
    return tensor.clone() if tensor.is_shared() else tensor
