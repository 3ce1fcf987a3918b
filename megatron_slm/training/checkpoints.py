"""What is done differently while Megatron saves and loads checkpoints: wrappers of its functions,
which megatron_hooks.py puts in their place.

Nothing of a save outlives the run: what this process writes needs no other process, and those of
--async-save end with it.  A save that fails says in a line what could not be written and what is
kept, on all ranks; the tracker file names a checkpoint that is whole, at any moment.
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
from megatron_slm.model.layer_spec import extra_states
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.training import helper_processes
from megatron_slm.training.nan import check_weights

POLL_SECONDS = 0.05
ROOM = 1 << 20  # bytes, below which a disk counts as full
_results: list[queue.Queue[Any]] = []  # of a save that this process writes itself


def wrap_save(
    save_checkpoint: Callable[..., Any], before_save: Callable[[int], None]
) -> Callable[..., Any]:
    """Return Megatron's `save_checkpoint` with checks and remedies.

    Args:
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
    """Return Megatron's `maybe_finalize_async_save`, whose failure is one line."""

    @functools.wraps(finalize)
    def finalize_save(*args: Any, **kwargs: Any) -> Any:
        with _saving("a checkpoint"):
            return finalize(*args, **kwargs)

    return finalize_save


def wrap_load(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's `load_checkpoint`, whose failure is one line."""

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
    """Return Megatron's `init_persistent_async_worker`, whose process ends with this one."""

    @functools.wraps(start_writer)
    def start(rank: int, mp_mode: str = "spawn") -> None:
        multiprocessing.set_forkserver_preload([helper_processes.__name__])
        try:
            with _without_sigterm():
                start_writer(rank, mp_mode)
        except ModuleNotFoundError as error:
            raise UserError(
                "--async-save needs nvidia-resiliency-ext, which is not installed; "
                "--async-strategy mcore does without"
            ) from error

    return start


def wrap_results_queue(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's `get_write_results_queue`, with a queue of threads for a save that this
    process writes itself.

    Megatron's own, a process of 0.5 GB that outlives this one, is for writers of --async-save;
    another checkpoint saved meanwhile would take their results for its own.
    """

    @functools.wraps(get_queue)
    def get_results_queue(*args: Any, **kwargs: Any) -> Any:
        return _results[-1] if _results else get_queue(*args, **kwargs)

    return get_results_queue


@contextmanager
def _written_here() -> Iterator[None]:
    """Take the results of what is saved meanwhile from this process's own threads."""
    _results.append(queue.Queue())
    try:
        yield
    finally:
        _results.pop()


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Keep SIGTERM from processes that are started: to all of a job it means that this one saves
    a last checkpoint, which they write."""
    resource_tracker.ensure_running()  # which would let the signal through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _saving(what: str) -> Iterator[None]:
    """Say in a line what has failed."""
    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, UserError) as error:
        raise UserError(_failed(what, _cause(error))) from error
    except RuntimeError as error:
        if not re.search("[Cc]onnection (closed|reset)", str(error)):
            raise
        raise UserError(_failed(what, "another rank has ended; see what it says")) from error


def _failed(what: str, cause: str) -> str:
    save = Path(get_args().save)
    try:
        last = (save / TRACKER).read_text()
    except OSError:
        last = ""
    kept = f"the last good one is that of iteration {last}" if last else "there is none before it"
    return f"{what} cannot be written to {save}: {cause}; {kept}"


def _cause(error: BaseException) -> str:
    """The innermost failure, in a line."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if not isinstance(error, CheckpointException):
        return " ".join(str(error).split())
    for rank, (failure, _) in error.failures.items():
        text = " ".join(str(failure).split()) or type(failure).__name__
        return f"rank {rank}: {text.rpartition(' error: ')[2]}"
    return "another rank failed; see what it says"


def wrap_write(write: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's `write_preloaded_data`, whose failure names the file: Megatron keeps of a
    thread's failure the name of its class alone."""

    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            file, failure = Path(kwargs["write_bucket"][0]), result[1]
            said = getattr(failure, "strerror", None) or " ".join(str(failure).split())
            disk = os.statvfs(file.parent)
            if disk.f_bavail * disk.f_frsize < ROOM:  # which torch does not always tell
                said = os.strerror(errno.ENOSPC)
            raise RuntimeError(f"{file}: {said}")
        return result

    return written


def wrap_is_done(is_done: Callable[..., bool]) -> Callable[..., bool]:
    """Return Megatron's `is_current_async_call_done`, which no longer waits for ever for the
    results of a writer that was killed."""

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
    """Open files as Megatron's `maybe_msc` does, but write tracker files whole."""

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
