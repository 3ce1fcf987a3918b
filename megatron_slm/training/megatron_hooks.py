"""Wrap symbols of Megatron's: this is the only file of the plug-in that replaces any.

(On a machine without a GPU, the CPU platform replaces more, to stand in for one.)

Once a step, and on every pipeline rank alike, Megatron looks up a schedule and calls it.  The
schedule is wrapped so that the reference's pass and the ranking of a whole step come first, as
passes of their own; then the policy's schedule runs on the micro-batches read for them.  (A pass
started within a forward step would wait for pipeline stages that wait for this one.)  The other
symbols are wrapped for the sake of checkpoints, of the log and of data.

The tables below have a row for each symbol.  Wrappers pass on whatever else Megatron gives them, so
a function may have gained optional parameters; one that has changed otherwise is refused.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

import megatron.core
from megatron.core.msc_utils import MaybeMultiStorageClient
from megatron.training import get_args

from megatron_slm.errors import UserError
from megatron_slm.training import checkpoints, event_writer, optimizer_state, report

VERSION = "0.19.2"
"""The megatron-core that the tables were written for."""
MARK = "wrapped_by_megatron_slm"
"""An attribute that marks wrappers."""

LOOP = "megatron.training.training"
ASYNC = "megatron.core.dist_checkpointing.strategies"


@dataclass(frozen=True)
class Hook:
    """A symbol of Megatron's, and what replaces it."""

    where: str
    """The module or class that has the symbol."""
    name: str
    """The symbol's name there."""
    takes: str | type
    """A function's parameters in that version, in order; the type of anything else."""
    reason: str
    """Why it is replaced."""
    wrap: Callable[[Any], Any]
    """Makes the replacement from the original."""


@dataclass(frozen=True)
class Run:
    """What the wrappers of a training run call."""

    run_step: Callable[..., Any]
    """Called as run_step(schedule, **arguments of the schedule) in the schedule's place."""
    before_save: Callable[[int], None]
    """Called with the iteration before a checkpoint is written."""
    after_training: Callable[[int], None]
    """Called with the iteration when the training loop has ended, also if a signal, --exit-interval
    or --exit-duration-in-mins ended it."""
    timed: bool
    """Whether there is a reference whose time is to be reported."""
    events: str | None
    """The directory of TensorBoard's events; None without any."""


_runs: list[Run] = []  # the run that the wrappers serve, if there is one


def install_for_training(run: Run) -> None:
    """Wrap Megatron for a training run.  Must be called before `pretrain()`.

    A second call wraps nothing twice, and makes the wrappers serve the run it is given.

    Raises:
        UserError: a symbol of the installed Megatron is not what the tables say.
    """
    _runs[:] = [run]
    _install((*STEP, *CHECKPOINTS, *LOG, *DATA))


def install_for_scoring() -> None:
    """Wrap Megatron for a job that only scores.  Must be called before Megatron is initialized.

    Raises:
        UserError: a symbol of the installed Megatron is not what the tables say.
    """
    _install(DATA)


def _run() -> Run:
    return _runs[-1]


def _before_save(iteration: int) -> None:
    _run().before_save(iteration)


def _wrap_schedule(get_schedule: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_schedule)
    def get_wrapped_schedule(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(_run().run_step, get_schedule(*args, **kwargs))

    return get_wrapped_schedule


def _wrap_train(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def train_and_finish(*args: Any, **kwargs: Any) -> Any:
        try:
            iteration, operations = train(*args, **kwargs)
        except SystemExit as left:
            if not left.code:  # training ended after a whole step, on all ranks alike
                _run().after_training(get_args().curr_iteration + 1)
            raise
        _run().after_training(iteration)
        return iteration, operations

    return train_and_finish


STEP = (
    Hook(
        LOOP,
        "get_forward_backward_func",
        "pp_size vp_size schedule_pg_collection",
        "the reference's pass and the ranking come before a step's schedule",
        _wrap_schedule,
    ),
    Hook(
        LOOP,
        "train",
        "forward_step_func model optimizer opt_param_scheduler train_data_iterator "
        "valid_data_iterator process_non_loss_data_func config checkpointing_context "
        "non_loss_data_func",
        "the last token dump is written when training has ended",
        _wrap_train,
    ),
)
CHECKPOINTS = (
    Hook(
        LOOP,
        "save_checkpoint",
        "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far "
        "checkpointing_context",
        "NaN is not saved, a moving average is saved first, and a failure is one line",
        lambda save: checkpoints.wrap_save(save, _before_save),
    ),
    Hook(
        LOOP,
        "load_checkpoint",
        "ddp_model optimizer opt_param_scheduler load_arg strict checkpointing_context",
        "a failure is one line",
        checkpoints.wrap_load,
    ),
    Hook(
        "megatron.core.optimizer.optimizer.ChainedOptimizer",
        "load_state_dict",
        "self state_dict",
        "the experts' state is found where the checkpoint has it, with experts shared out or not",
        optimizer_state.wrap_load_state,
    ),
    Hook(
        LOOP,
        "maybe_finalize_async_save",
        "blocking terminate",
        "a failure is one line",
        checkpoints.wrap_finalize,
    ),
    Hook(
        "megatron.training.initialize",
        "init_persistent_async_worker",
        "rank mp_mode",
        "the process that writes for --async-save has to end with the run",
        checkpoints.wrap_start_writer,
    ),
    Hook(
        "megatron.training.checkpointing",
        "maybe_msc",
        MaybeMultiStorageClient,
        "the tracker file names a whole checkpoint at any moment",
        lambda original: checkpoints.WholeTrackers(),
    ),
    Hook(
        f"{ASYNC}.filesystem_async",
        "get_write_results_queue",
        "mp_mode",
        "a save without --async-save need not start a process",
        checkpoints.wrap_results_queue,
    ),
    Hook(
        f"{ASYNC}.filesystem_async.FileSystemWriterAsync",
        "write_preloaded_data",
        "transform_list local_proc_idx write_bucket results_queue count_queue use_fsync",
        "a failure names the file",
        lambda write: staticmethod(checkpoints.wrap_write(write)),
    ),
    Hook(
        f"{ASYNC}.async_utils.PersistentAsyncCaller",
        "is_current_async_call_done",
        "self blocking no_dist",
        "a writer that was killed must not be waited for",
        checkpoints.wrap_is_done,
    ),
)
_validation = report.Validation()
LOG = (
    Hook(
        LOOP,
        "training_log",
        "loss_dict total_loss_dict learning_rate iteration loss_scale report_memory_flag "
        "skipped_iter grad_norm params_norm num_zeros_in_grad max_attention_logit",
        "averages below zero and our timers are printed too",
        lambda log: report.wrap_log(log, lambda: _run().timed),
    ),
    Hook(
        LOOP,
        "evaluate",
        "forward_step_func data_iterator model process_non_loss_data_func config verbose",
        "values that are not losses have no perplexity",
        _validation.wrap_evaluate,
    ),
    Hook(
        LOOP,
        "evaluate_and_print_results",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func "
        "config verbose write_to_tensorboard",
        "values that are not losses come after the losses; sets are whole with pipeline stages",
        _validation.wrap_print,
    ),
    Hook(
        "tensorboard.summary.writer.record_writer.RecordWriter",
        "write",
        "self data",
        "a full disk ends the events and not the run",
        lambda write: event_writer.wrap_write(write, lambda: _run().events),
    ),
)
DATA = (
    Hook(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "",
        "the wheel has the helpers compiled, and has no Makefile to compile them with",
        lambda original: lambda: None,
    ),
)
NEEDS = {"compile_helpers": "megatron.core.datasets.helpers_cpp", "write": "tensorboard"}
"""The module that a symbol, by its name, needs; without it the symbol is left as it is."""


def _install(hooks: Iterable[Hook]) -> None:
    """Check all symbols, wrap those that are not wrapped yet, and print their names."""
    new = []
    for hook in hooks:
        if hook.name not in NEEDS or find_spec(NEEDS[hook.name]) is not None:
            now = getattr(resolve_name(hook.where), hook.name, None)
            if not getattr(now, MARK, False):
                _check(hook, now)
                new.append((hook, now))
    for hook, now in new:
        wrapper = hook.wrap(now)
        setattr(getattr(wrapper, "__func__", wrapper), MARK, True)  # a staticmethod's function
        setattr(resolve_name(hook.where), hook.name, wrapper)
    if new and os.getenv("RANK", "0") == "0":
        names = ", ".join(f"{hook.where}.{hook.name}" for hook, _ in new)
        print(f"> wrapped in Megatron {megatron.core.__version__}: {names}", flush=True)


def _check(hook: Hook, now: Any) -> None:
    """Refuse a symbol that is not what the tables say.

    Raises:
        UserError: it is not; the message names it and both versions of Megatron.
    """
    if isinstance(hook.takes, type):
        expected, found = hook.takes.__name__, type(now).__name__
        fits = isinstance(now, hook.takes)
    else:
        known = hook.takes.split()
        parameters = list(inspect.signature(now).parameters.values()) if callable(now) else []
        names = [parameter.name for parameter in parameters]
        expected, found = (f"{hook.name}({', '.join(each)})" for each in (known, names))
        fits = callable(now) and names[: len(known)] == known
        for more in parameters[len(known) :]:
            many = more.kind in (more.VAR_POSITIONAL, more.VAR_KEYWORD)
            fits = fits and (many or more.default is not more.empty)
    if not fits:
        raise UserError(
            f"{hook.where}.{hook.name} is {expected} in megatron-core {VERSION}, for which this "
            f"version of megatron-slm was written, and {found if now is not None else 'missing'} "
            f"in the installed megatron-core {megatron.core.__version__}: install megatron-core "
            f"{VERSION}"
        )
