"""Data that can no longer be read in the middle of a run, in one line.

Files that are truncated under a run end a loader's worker by a bus error, as memory that runs out
does by a kill; torch then raises a RuntimeError without the file.
"""

from __future__ import annotations

import signal
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from megatron_slm.errors import UserError
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.training.datasets import check_files

WORKER = "DataLoader worker"
OF_DATA = ("megatron/core/datasets/", "megatron_slm/data/")  # files of frames


def _no_raising_handler() -> None:
    """Keep torch from raising, in a handler of SIGCHLD, wherever the main process is when a worker
    ends: a checkpoint is cut off by it, or the report of the fault itself."""
    before = signal.getsignal(signal.SIGCHLD)
    _set_SIGCHLD_handler()  # which it does once in a process
    signal.signal(signal.SIGCHLD, before)


@contextmanager
def data_faults(args: Namespace, kept: str | None = None) -> Iterator[None]:
    """Say in one line what failed when data was read.

    Args:
        kept: what remains of the job; by default the last checkpoint of --save.

    Raises:
        UserError: in the place of an exception of reading data, with the file.
    """
    _no_raising_handler()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _changed(args) or _cause(error)
        if cause is None:
            raise
        raise UserError(f"{cause}; {kept or _kept(args)}") from error


def _changed(args: Namespace) -> str | None:
    """Say which dataset is no longer what it was at the start, whatever failure that led to: ids
    beyond the vocabulary, or a rank that waits for another."""
    try:
        check_files(args, draws=False)
    except UserError as found:
        return f"a dataset has changed during the run: {found}"
    return None


def _cause(error: Exception) -> str | None:
    """Say what failed where data is read; None for another failure."""
    text = str(error).strip() or repr(error)
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # torch notices the end of a worker where it waits for data, or where it takes it from a pipe.
    cut_off = isinstance(error, OSError | EOFError) and any("multiprocessing/" in f for f in files)
    if cut_off or (WORKER in text and "exited unexpectedly" in text):
        return (
            "a worker that loads data was killed, though the datasets' files are whole: see "
            "whether memory or /dev/shm ran out, or take fewer with --num-workers"
        )
    if WORKER in text or any(part in file for file in files for part in OF_DATA):
        return f"reading the data failed: {text.splitlines()[-1 if 'Traceback' in text else 0]}"
    return None


def _kept(args: Namespace) -> str:
    """Say what remains of a run that ends here."""
    if args.save is None:
        return "nothing was saved, as there is no --save"
    with suppress(OSError, ValueError):
        iteration = (Path(args.save) / TRACKER).read_text().strip()
        return f"the last checkpoint in {args.save} is of iteration {iteration}: --load it to go on"
    return f"no checkpoint had been saved in {args.save}"
