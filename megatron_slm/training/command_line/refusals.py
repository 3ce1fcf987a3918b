"""Turn Megatron's refusals of arguments, which are tracebacks, into one line.

Megatron checks arguments in many places between the command line and the first step, often by an
assertion without a message.  Its message, or else the line of its source, becomes a UserError that
names the place.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron.core
import megatron.training

from megatron_slm.errors import UserError

MOST = 400  # characters of what Megatron says
# What to do, where Megatron says only what is wrong: by the beginning of its message.
REMEDIES = {
    "OptimizerParamScheduler: class input value ": "for a longer run, or another schedule, give "
    "--override-opt-param-scheduler; --use-checkpoint-opt-param-scheduler keeps the checkpoint's",
}
OURS = Path(__file__).parents[2]
PLATFORM = Path(__file__).parents[2] / "cpu_platform"  # a GPU machine never imports it
MEGATRON = tuple(
    Path(path).parent for package in (megatron.core, megatron.training) for path in package.__path__
)


@contextmanager
def in_one_line(begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an exception by which Megatron refuses arguments into a UserError.

    Args:
        begun: tells whether training has begun, after which exceptions are not about arguments.

    Raises:
        UserError: Megatron raised an exception.  Exceptions that others raised pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A missing package may show as late as in a step.
        late = begun() and not isinstance(error, ImportError)
        frame = None if late else _refusing_frame(error)
        if frame is None:
            raise
        if isinstance(error, OSError) and error.filename:  # the user named the file
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(f"Megatron refuses these arguments: {_words(error, frame)}") from error


def _refusing_frame(error: Exception) -> traceback.FrameSummary | None:
    """Find the frame of Megatron's that raised the error, or that called what raised it.

    Return None if the error is not a refusal, but a fault of ours or of the machine.
    """
    frames = traceback.extract_tb(error.__traceback__)
    # The platform's functions are called by Megatron in place of torch's.
    known = [
        frame
        for frame in frames
        if _is_in(frame, (OURS, *MEGATRON)) and not _is_in(frame, (PLATFORM,))
    ]
    if not known or _is_in(known[-1], (OURS,)):
        return None
    # torch raises RuntimeErrors for memory, devices and connections.
    if isinstance(error, RuntimeError | MemoryError):
        said = frames[-1] is known[-1] and (known[-1].line or "").startswith("raise")
        return known[-1] if said else None
    return known[-1]


def _is_in(frame: traceback.FrameSummary, directories: tuple[Path, ...]) -> bool:
    return any(Path(frame.filename).is_relative_to(directory) for directory in directories)


def _words(error: Exception, frame: traceback.FrameSummary) -> str:
    """Put the error's message, or else the source that raised it, into one line with its place."""
    words = " ".join(str(error).split())
    if not words:
        first = frame.lineno or 1
        lines = range(first, (frame.end_lineno or first) + 1)
        words = " ".join(" ".join(linecache.getline(frame.filename, at) for at in lines).split())
    elif not isinstance(error, AssertionError | ValueError) and type(error) is not Exception:
        words = f"{type(error).__name__}: {words}"
    if len(words) > MOST:
        words = f"{words[:MOST]}..."
    remedies = [remedy for begins, remedy in REMEDIES.items() if words.startswith(begins)]
    path = Path(frame.filename)
    base = next(each for each in MEGATRON if path.is_relative_to(each)).parent
    place = f"({path.relative_to(base)}:{frame.lineno})"
    return "; ".join([f"{words} {place}", *remedies])
