"""Keep a run going when TensorBoard's events cannot be written.

TensorBoard writes from a thread of its own.  A failure there would end the run at some later call,
and the steps since the last checkpoint would be lost for events that are only there to look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_slm.files import make_directory


def check_directory(directory: str | None) -> None:
    """Check that TensorBoard's events can be written to a directory.

    Args:
        directory: --tensorboard-dir; None if no events are to be written.

    Raises:
        UserError: they cannot.
    """
    if directory is not None and "://" not in directory:
        make_directory(Path(directory), "--tensorboard-dir")


def wrap_write(
    write: Callable[..., None], directory: Callable[[], str | None]
) -> Callable[..., None]:
    """Wrap the `write` of TensorBoard's RecordWriter: warn of a failure once, and stop writing.

    Args:
        write: the original.
        directory: returns the directory of the events, for the warning.
    """
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
