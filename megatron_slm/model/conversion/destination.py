"""Write a directory that gets its name only when all ranks have finished writing it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from torch import distributed

from megatron_slm.errors import UserError
from megatron_slm.files import alone_at, leftovers, publish, sync, temporary


def this_rank() -> tuple[int, int]:
    """Return the rank and the number of ranks; (0, 1) without torchrun."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def together[T](work: Callable[[], T]) -> T:
    """Do this rank's part of a job; if it fails on one rank, it fails on all of them.

    Collective over ranks.  `work` itself must not use collectives.

    Returns:
        What `work` returned on this rank.

    Raises:
        UserError: the failure of the lowest rank that failed, on every rank.
    """
    error = None
    try:
        result = work()
    except UserError as mistake:
        error = str(mistake)
    except Exception as bug:
        _share(f"rank {this_rank()[0]} failed: {bug!r}")
        raise
    for shared in _share(error):
        if shared is not None:
            raise UserError(shared)
    return result


def on_first_rank(work: Callable[[], None]) -> None:
    """Do the work on the first rank, for all ranks.  Collective over ranks.

    Raises:
        UserError: the work failed; raised on every rank.
    """
    together(work if this_rank()[0] == 0 else lambda: None)


def _share(error: str | None) -> list[str | None]:
    errors = [error] * this_rank()[1]
    if distributed.is_initialized():
        distributed.all_gather_object(errors, error)
    return errors


@contextmanager
def finished_directory(path: Path, flag: str) -> Iterator[Path]:
    """Yield a new directory to write into, which durably gets its name when the block ends.

    If the block fails or is interrupted, nothing is left, nor directories above that were made for
    it.  What a killed run has left is removed by the next one.  Collective over ranks.

    Args:
        path: the directory's name; a link stands for what it points to.
        flag: the argument that names it, for errors.

    Raises:
        UserError: `path` exists already, another run is writing it, or it cannot be written.
    """
    path = Path(os.path.realpath(path))
    unfinished = temporary(path)
    with ExitStack() as held:
        if distributed.is_initialized():
            names = [unfinished]
            distributed.broadcast_object_list(names)
            unfinished = names[0]
        on_first_rank(partial(_begin, path, unfinished, flag, held))
        try:
            yield unfinished
            on_first_rank(partial(_finish, path, unfinished))
        finally:
            if this_rank()[0] == 0:
                shutil.rmtree(unfinished, ignore_errors=True)


def _begin(path: Path, unfinished: Path, flag: str, held: ExitStack) -> None:
    with saying_where(path):
        held.callback(_remove_empty, [each for each in path.parents if not each.exists()])
        path.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone_at(path, flag))
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{flag} {path} exists already; name another directory, or remove it")
        for left in leftovers(path):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
        unfinished.mkdir()


def _remove_empty(made: list[Path]) -> None:
    """Remove directories that were made, the innermost first, if nothing was then put into them."""
    with suppress(OSError):
        for directory in made:
            directory.rmdir()


def _finish(path: Path, unfinished: Path) -> None:
    with saying_where(path):
        for name in [unfinished, *unfinished.rglob("*")]:
            descriptor = os.open(name, os.O_RDONLY)
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)
        publish(unfinished, path)


@contextmanager
def saying_where(path: Path) -> Iterator[None]:
    """Turn the system's errors in the block into one line that names `path`.

    Raises:
        UserError: `path` cannot be written: no space, no permission, or a file is in its way.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write {path}: {cause.strerror or cause}; nothing of it is kept"
        ) from error
