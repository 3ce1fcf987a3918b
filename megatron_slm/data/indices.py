"""Say in one line what is wrong with the indices that Megatron keeps of datasets.

Megatron writes an index in place, and takes a file that is there for the whole.  So one that a full
disk has cut off is removed, and one that a kill has cut off is named.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from megatron_slm.errors import UserError


@contextmanager
def building_indices(remedy: str) -> Iterator[None]:
    """Turn the errors of Megatron's building of datasets in the block into one line.

    Args:
        remedy: what to do where an index cannot be written, for the error.

    Raises:
        UserError: an index cannot be written, or one that is there is damaged.
    """
    try:
        yield
    except (EOFError, ValueError, UnpicklingError) as error:
        if (index := _index_of(error, "load")) is None:
            raise
        raise UserError(
            f"{index} is damaged: remove it, and the same command makes it again"
        ) from error
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        where = cause.filename
        if where is None and (index := _index_of(cause, "save")) is not None:
            index.unlink(missing_ok=True)
            where = index
        raise UserError(f"{where or 'an index'}: {cause.strerror or cause}: {remedy}") from error


def _index_of(error: BaseException, function: str) -> Path | None:
    """Return the file that a function of numpy was given, if an error was raised in it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        of_numpy = frame.f_globals.get("__name__", "").startswith("numpy.")
        if of_numpy and frame.f_code.co_name == function:
            return Path(frame.f_locals["file"])
    return None
