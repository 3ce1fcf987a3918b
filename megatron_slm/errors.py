"""End a command that fails with one line and exit code 2, or 130 after Ctrl-C.

torchrun starts several ranks on a machine, which mostly find the same fault: the first to do so
prints it.  The message also goes into the file from which torchrun takes the cause for its own
report, which is printed last.
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
# These say that a place the user named cannot be used; other numbers are faults of the program.
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
    """An error in the input.  Its message says what is wrong, where, and what to do."""


@contextmanager
def exit_on_user_error(
    go_on: str = "the same command starts again", *, at_once: bool = False
) -> Iterator[None]:
    """Exit with one line at a UserError, at a file that cannot be used, also the one to which
    standard output goes, and at Ctrl-C.

    The exit code is 2, or 130 for Ctrl-C.  Other exceptions are bugs, and pass.

    Args:
        go_on: how to continue after Ctrl-C, which is printed after "interrupted".
        at_once: exit at Ctrl-C without cleaning up.  A rank has to, since cleaning up may wait for
            another rank.
    """
    try:
        with _interrupt(go_on, at_once):
            yield
            sys.stdout.flush()
    except KeyboardInterrupt:
        _say_once(f"interrupted: {go_on}")
        sys.exit(INTERRUPTED)
    except UserError as error:
        # If a loader's worker raised it, the message stands at the end of the worker's traceback.
        _refuse(str(error).rpartition(f"{__name__}.UserError: ")[2].strip())
    except OSError as error:
        if error.filename is None and "temporary directory" in str(error):  # which torch looks for
            _refuse(f"{error.strerror}; make room in one, or name another by TMPDIR")
        if error.filename is None and not _can_print():
            _refuse(f"standard output: {error.strerror}")
        if error.errno not in _PLACES or error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")


@contextmanager
def _interrupt(go_on: str, at_once: bool) -> Iterator[None]:
    """Handle Ctrl-C, which reaches all processes of a command, while the block lasts.

    The first Ctrl-C ends this process, and a second one ends it at once.  Processes forked from it
    ignore both, and leave it to their parent to end them.
    """
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
        """Raise Ctrl-C again a moment later where Python drops it, for example while forking."""
        if fault.exc_type is not KeyboardInterrupt:
            hook(fault)
            return
        signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    # A script's background command ignores Ctrl-C, and only the main thread may set handlers.
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
    """Print a line about this run, on the first rank only."""
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


def _can_print() -> bool:
    """Return whether standard output takes one more line; if so, end the line that it is in."""
    try:
        sys.stdout.flush()
        os.write(1, b"\n")
    except OSError:
        return False
    return True


def _say_once(line: str) -> None:
    """Print a line after all else, unless another rank of this machine has printed it already."""
    if not _first_to_say(line):
        return
    try:
        sys.stdout.flush()
    except RuntimeError:  # Ctrl-C may have interrupted a print
        pass
    except OSError:  # Python would try it again at its end, and exit with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        print(line, file=sys.stderr, flush=True)
    except RuntimeError:
        os.write(2, f"{line}\n".encode())
    except OSError:  # nobody can be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _first_to_say(line: str) -> bool:
    file = os.getenv("TORCHELASTIC_ERROR_FILE")  # each rank has a directory, beside the others'
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
