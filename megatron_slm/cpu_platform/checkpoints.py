"""The process that writes asynchronous saves, and copies of what it writes.

It is forked from this one: started afresh it would know nothing of the platform.  On a GPU it
copies tensors to the host first, and training waits for that alone; here they are in memory that
both share, and without a copy training would go on changing them while they are written.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Called once, by `cpu_platform.install`."""
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
