"""How a command ends other than well: by one line, and exit code 2, or 130 for Ctrl-C.

torchrun starts several ranks on a machine, which mostly find the same fault: the first prints it.
The message also goes into the file from which torchrun's own report, the last that is printed then,
says what the cause was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

EXIT_CODE = 2
INTERRUPTED = 128 + signal.SIGINT
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
def exit_on_user_error(
    go_on: str = "the same command starts again", *, at_once: bool = False
) -> Iterator[None]:
    """Leave with one line: exit code 2 for a UserError or a place that cannot be read or written,
    130 for Ctrl-C.  Other exceptions are bugs.

    Args:
        go_on: what Ctrl-C says, after "interrupted".
        at_once: end at Ctrl-C without cleaning up, as a rank must that may wait for another.
    """
    try:
        with _interrupt(go_on, at_once):
            yield
    except KeyboardInterrupt:
        _say_once(f"interrupted: {go_on}")
        sys.exit(INTERRUPTED)
    except UserError as error:
        # One from a loader's worker comes as the worker's traceback, with the message at its end.
        _refuse(str(error).rpartition(f"{__name__}.UserError: ")[2].strip())
    except OSError as error:
        if error.errno not in _PLACES or error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")


@contextmanager
def _interrupt(go_on: str, at_once: bool) -> Iterator[None]:
    """Take Ctrl-C, which reaches all processes of a command: the first ends this process, a second
    does so at once, and processes forked from it leave it to their parent."""
    before = signal.getsignal(signal.SIGINT)
    own = os.getpid()

    def interrupted(_: int, __: FrameType | None) -> None:
        if os.getpid() != own:
            return
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        if not at_once:
            raise KeyboardInterrupt
        _say_once(f"interrupted: {go_on}")
        os._exit(INTERRUPTED)

    def ignored(fault: sys.UnraisableHookArgs) -> None:
        """Raise it again, a moment later, where Python drops it: in a callback of a fork, say."""
        if fault.exc_type is not KeyboardInterrupt:
            hook(fault)
            return
        signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    # Ignored where a script started the command in the background; a thread cannot set it.
    ours = before not in (signal.SIG_IGN, None)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, ignored
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is interrupted:
            signal.signal(signal.SIGINT, before)


def say(line: str) -> None:
    """Print a line about this run, on the first rank alone."""
    if os.getenv("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _refuse(message: str) -> NoReturn:
    line = f"error: {message}"
    _say_once(line)
    if file := os.getenv("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
    sys.exit(EXIT_CODE)


def _say_once(line: str) -> None:
    """Print a line after all else, unless another rank that torchrun started here has."""
    if not _first_to_say(line):
        return
    with suppress(RuntimeError, OSError):  # where this interrupts a print
        sys.stdout.flush()
    try:
        print(line, file=sys.stderr, flush=True)
    except RuntimeError:
        os.write(2, f"{line}\n".encode())


def _first_to_say(line: str) -> bool:
    file = os.getenv("TORCHELASTIC_ERROR_FILE")  # in a directory of each rank's, beside the others'
    if not file:
        return True
    said = Path(file).parents[1] / f"said-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
