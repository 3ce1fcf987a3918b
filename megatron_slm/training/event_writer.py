"""TensorBoard's events where they cannot be written: training goes on without them.

TensorBoard writes from a thread of its own, whose fault would end the run at some later call, and
with it the steps since the last checkpoint.  Its events are there to be looked at.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError


def install(directory: str | None) -> None:
    """Say once that events cannot be written, and write no more.  Call once, before `pretrain()`.

    Args:
        directory: that of the events (--tensorboard-dir), or None.

    Raises:
        UserError: it cannot be written to from the start.
    """
    if directory is None:
        return
    if "://" not in directory:
        _check(Path(directory))
    try:
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:  # Megatron says that there will be no events
        return
    write = RecordWriter.write
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
                f"WARNING: cannot write to {directory}: {error.strerror}; training goes on without "
                "TensorBoard's events",
                flush=True,
            )

    RecordWriter.write = write_or_say


def _check(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--tensorboard-dir {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--tensorboard-dir {directory} cannot be written to")
