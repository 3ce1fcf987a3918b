"""Wrappers of Megatron's functions that save and load checkpoints; megatron_hooks.py installs them.

No process of a save outlives the run: what this process writes needs no other process, and the
processes of --async-save end with it.  A save that fails says in one line, on all ranks, what could
not be written and what is kept.  At any moment, the tracker file names a whole checkpoint.
"""

from __future__ import annotations

import errno
import functools
import io
import multiprocessing
import os
import queue
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.msc_utils import MaybeMultiStorageClient, MultiStorageClientFeature
from megatron.training import get_args
from torch.distributed.checkpoint import CheckpointException

from megatron_slm.errors import UserError
from megatron_slm.files import write_whole
from megatron_slm.model.extra_states import extra_states
from megatron_slm.model.torch_dist import TRACKER, saved_iteration
from megatron_slm.training import helper_processes
from megatron_slm.training.nan import check_weights

POLL_SECONDS = 0.05
ROOM = 1 << 20  # a disk with fewer bytes left counts as full
# Queue of the results of a save that this process writes itself, while there is one.
_results: list[queue.Queue[Any]] = []


def wrap_save(
    save_checkpoint: Callable[..., Any], before_save: Callable[[int], None]
) -> Callable[..., Any]:
    """Wrap Megatron's `save_checkpoint`: check the weights first, and report failures in one line.

    Args:
        save_checkpoint: the original.
        before_save: called with the iteration before a checkpoint is written.
    """

    @functools.wraps(save_checkpoint)
    def save(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        check_weights(model, iteration)
        with _saving(f"the checkpoint of iteration {iteration}"), extra_states(model):
            with _written_here():
                before_save(iteration)
            if get_args().async_save:
                return save_checkpoint(iteration, model, *args, **kwargs)
            with _written_here():
                return save_checkpoint(iteration, model, *args, **kwargs)

    return save


def wrap_finalize(finalize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `maybe_finalize_async_save`: report failures in one line."""

    @functools.wraps(finalize)
    def finalize_save(*args: Any, **kwargs: Any) -> Any:
        with _saving("a checkpoint"):
            return finalize(*args, **kwargs)

    return finalize_save


def wrap_load(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `load_checkpoint`: report failures in one line."""

    @functools.wraps(load_checkpoint)
    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return load_checkpoint(*args, **kwargs)
        except (CheckpointException, CheckpointingException) as error:
            where = get_args().load or get_args().pretrained_checkpoint
            raise UserError(
                f"the checkpoint in {where} cannot be loaded: {_cause(error)}"
            ) from error

    return load


def wrap_start_writer(start_writer: Callable[..., None]) -> Callable[..., None]:
    """Wrap Megatron's `init_persistent_async_worker`: end the worker's process with this one."""

    @functools.wraps(start_writer)
    def start(rank: int, mp_mode: str = "spawn") -> None:
        multiprocessing.set_forkserver_preload([helper_processes.__name__])
        try:
            with _without_sigterm():
                start_writer(rank, mp_mode)
        except ModuleNotFoundError as error:
            raise UserError(
                "--async-save needs nvidia-resiliency-ext, which is not installed: install it, or "
                "give --async-strategy mcore, which does not need it"
            ) from error

    return start


def wrap_results_queue(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `get_write_results_queue`: give a save without --async-save its own queue.

    Megatron's queue is a process of 0.5 GB, which outlives this one.  It is meant for the writers
    of --async-save; a checkpoint saved meanwhile would take their results for its own.
    """

    @functools.wraps(get_queue)
    def get_results_queue(*args: Any, **kwargs: Any) -> Any:
        return _results[-1] if _results else get_queue(*args, **kwargs)

    return get_results_queue


@contextmanager
def _written_here() -> Iterator[None]:
    """Let this process's own threads hand over the results of what is saved in the block."""
    _results.append(queue.Queue())
    try:
        yield
    finally:
        _results.pop()


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Make processes that are started in the block ignore SIGTERM.

    A job's processes all receive it, and this one then saves a last checkpoint, which they write.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _saving(what: str) -> Iterator[None]:
    """Report in one line a failure to save `what`.

    Raises:
        UserError: it could not be saved.
    """
    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, UserError) as error:
        raise UserError(_failed(what, _cause(error))) from error
    except RuntimeError as error:
        if not re.search("[Cc]onnection (closed|reset)", str(error)):
            raise
        raise UserError(_failed(what, "another rank has ended; see what it says")) from error


def _failed(what: str, cause: str) -> str:
    save = get_args().save
    last = saved_iteration(save)
    kept = f"the last good one is that of iteration {last}" if last else "there is none before it"
    return f"{what} cannot be written to {save}: {cause}; {kept}"


def _cause(error: BaseException) -> str:
    """Describe the innermost failure in one line."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if not isinstance(error, CheckpointException):
        return " ".join(str(error).split())
    for rank, (failure, _) in error.failures.items():
        text = " ".join(str(failure).split()) or type(failure).__name__
        return f"rank {rank}: {text.rpartition(' error: ')[2]}"
    return "another rank failed; see what it says"


def wrap_write(write: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `write_preloaded_data`: let a failure name the file.

    Of a failure in a thread, Megatron would keep only the name of its class.
    """

    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            file, failure = Path(kwargs["write_bucket"][0]), result[1]
            said = getattr(failure, "strerror", None) or " ".join(str(failure).split())
            disk = os.statvfs(file.parent)
            if disk.f_bavail * disk.f_frsize < ROOM:  # torch does not always say so
                said = os.strerror(errno.ENOSPC)
            raise RuntimeError(f"{file}: {said}")
        return result

    return written


def wrap_is_done(is_done: Callable[..., bool]) -> Callable[..., bool]:
    """Wrap Megatron's `is_current_async_call_done`: do not wait for ever for a killed writer."""

    @functools.wraps(is_done)
    def looked(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while (
            self.process is not None and self.cur_item is None and self._persistent_comp_q.empty()
        ):
            if not self.process.is_alive():
                raise CheckpointingException(
                    f"the process that writes it has ended ({self.process.exitcode})"
                )
            if not blocking:
                break
            time.sleep(POLL_SECONDS)
        done: bool = is_done(self, blocking, no_dist)
        return done

    return looked


class WholeTrackers(MaybeMultiStorageClient):
    """A `maybe_msc` like Megatron's, which opens files, but writes tracker files whole."""

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        own = Path(path).name == TRACKER and mode == "w"
        if own and not MultiStorageClientFeature.is_enabled():
            return _whole(Path(path))
        return self.__getattr__("open")(path, mode, *args, **kwargs)


@contextmanager
def _whole(path: Path) -> Iterator[io.StringIO]:
    content = io.StringIO()
    yield content
    write_whole(path, content.getvalue().encode())
