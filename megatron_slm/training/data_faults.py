"""Report in one line that data can no longer be read in the middle of a run.

If a file is truncated during a run, a worker of the data loader dies of a bus error; if memory runs
out, it is killed.  In both cases torch raises a RuntimeError that does not name the file.
"""

from __future__ import annotations

import signal
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from megatron_slm.errors import UserError
from megatron_slm.model.torch_dist import saved_iteration
from megatron_slm.training.datasets import check_files

WORKER = "DataLoader worker"
# Frames of a traceback in these directories show that data was being read.
OF_DATA = ("megatron/core/datasets/", "megatron_slm/data/")


def _no_raising_handler() -> None:
    """Keep torch's SIGCHLD handler from raising in the main process when a worker dies.

    It would raise wherever the main process happens to be, and so could cut off a checkpoint, or
    the report of the fault itself.
    """
    before = signal.getsignal(signal.SIGCHLD)
    _set_SIGCHLD_handler()  # torch does so only once in a process
    signal.signal(signal.SIGCHLD, before)


@contextmanager
def data_faults(args: Namespace, kept: str | None = None) -> Iterator[None]:
    """Turn exceptions of reading data into a UserError.

    Args:
        kept: what remains of the job, in words; by default, the last checkpoint of --save.

    Raises:
        UserError: data could not be read; the message names the file.  Other exceptions pass.
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
    """Say which dataset is no longer what it was at the start, if one is not.

    A change can surface as any failure: ids beyond the vocabulary, or a rank that waits for
    another.
    """
    try:
        check_files(args, draws=False)
    except UserError as found:
        return f"a dataset has changed during the run: {found}"
    return None


def _cause(error: Exception) -> str | None:
    """Say what failed when data was read; return None if something else failed."""
    text = str(error).strip() or repr(error)
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # torch notices a worker's end when it waits for data, or when it reads data from a pipe.
    cut_off = isinstance(error, OSError | EOFError) and any("multiprocessing/" in f for f in files)
    if cut_off or (WORKER in text and "exited unexpectedly" in text):
        return (
            "a worker that loads data was killed, though the datasets' files are whole: see "
            "whether memory or /dev/shm ran out, or use fewer workers (--num-workers)"
        )
    if WORKER in text or any(part in file for file in files for part in OF_DATA):
        return f"reading the data failed: {text.splitlines()[-1 if 'Traceback' in text else 0]}"
    return None


def _kept(args: Namespace) -> str:
    """Say what remains of a run that ends here."""
    if args.save is None:
        return "nothing was saved, as there is no --save"
    iteration = saved_iteration(args.save)
    if iteration is None:
        return f"no checkpoint had been saved in {args.save}"
    return f"the last checkpoint in {args.save} is of iteration {iteration}: --load it to go on"
