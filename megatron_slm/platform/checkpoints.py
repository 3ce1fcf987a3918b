"""Copies of what an asynchronous save writes.

On a GPU the process that writes copies tensors to the host first, and training waits for that
alone.  Here they are in memory that both share: without a copy training would go on changing them
while they are written.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Called once, by `platform.install`."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

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
