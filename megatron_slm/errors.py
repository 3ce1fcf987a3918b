"""The one exception for mistakes a user can mend: printed without a traceback, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class UserError(Exception):
    """Bad input.  The message says what is wrong, where, and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a UserError as one line and leave with exit code 2; other exceptions are bugs."""
    try:
        yield
    except UserError as error:
        # One from a loader's worker comes as the worker's traceback, with the message at its end.
        message = str(error).rpartition(f"{__name__}.UserError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
