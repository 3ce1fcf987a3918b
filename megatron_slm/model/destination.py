"""A directory that appears only when all ranks have finished writing it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from megatron_slm.errors import UserError


def this_rank() -> tuple[int, int]:
    """Rank and number of ranks; one of one without torchrun."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def wait_for_all() -> None:
    """A barrier."""
    if distributed.is_initialized():
        distributed.barrier()


@contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """Where to write.  Renamed to `path` at the end; what an earlier crash left is removed.

    Raises:
        UserError: `path` is there already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; name another directory, or remove it")
    partial = path.with_name(f"{path.name}.partial")
    rank, _ = this_rank()
    wait_for_all()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    yield partial
    wait_for_all()
    if rank == 0:
        partial.rename(path)
    wait_for_all()
