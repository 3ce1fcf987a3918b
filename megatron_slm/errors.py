"""The one exception for mistakes a user can mend: printed without a traceback, exit code 2."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
# Of a place that the user named, not of the program.
_PLACES = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}


class UserError(Exception):
    """Bad input.  The message says what is wrong, where, and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Leave with one line: exit code 2 for a UserError or a place that cannot be read or written,
    130 for Ctrl-C.  Other exceptions are bugs."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        # One from a loader's worker comes as the worker's traceback, with the message at its end.
        message = str(error).rpartition(f"{__name__}.UserError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except OSError as error:
        if error.errno not in _PLACES or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
