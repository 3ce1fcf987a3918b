"""TensorBoard's events where they cannot be written: training goes on without them.

TensorBoard writes from a thread of its own, whose fault would end the run at some later call, and
with it the steps since the last checkpoint.  Its events are there to be looked at.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError


def check_directory(directory: str | None) -> None:
    """Check that TensorBoard's events can be written where they are to be.

    Args:
        directory: that of the events (--tensorboard-dir); None for no events.

    Raises:
        UserError: they cannot.
    """
    if directory is None or "://" in directory:
        return
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--tensorboard-dir {directory}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--tensorboard-dir {directory} cannot be written to")


def wrap_write(
    write: Callable[..., None], directory: Callable[[], str | None]
) -> Callable[..., None]:
    """Return the `write` of TensorBoard's RecordWriter, which says once that events cannot be
    written to the directory, and writes no more."""
    failed = set[int]()  # a record behind a torn one could not be read

    @functools.wraps(write)
    def write_or_say(self: Any, data: bytes) -> None:
        if id(self) in failed:
            return
        try:
            write(self, data)
        except OSError as error:
            failed.add(id(self))
            print(
                f"WARNING: cannot write to {directory()}: {error.strerror}; training goes on "
                "without TensorBoard's events",
                flush=True,
            )

    return write_or_say
