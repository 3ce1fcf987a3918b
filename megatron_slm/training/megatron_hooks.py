"""Every symbol of Megatron's that the plug-in replaces: the only file that does so.  (On a machine
without a GPU the CPU platform replaces more, to stand in for one.)

Megatron looks a schedule up and calls it once a step, on every pipeline rank alike.  The schedule
is wrapped so that what has to come first (the reference's pass, the ranking of a whole step) comes
first, as passes of their own, and then the policy's schedule runs on the micro-batches read for
them.  (Started from within a forward step, another pass would wait for pipeline stages that wait
for this one.)  The other symbols are wrapped for checkpoints, for the log and for data.

The tables have a row for each symbol.  A wrapper passes on whatever else Megatron gives it, so a
function may have gained optional parameters; one that has changed in another way is refused.
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
from megatron_slm.training import checkpoints, event_writer, report

VERSION = "0.19.2"
"""The megatron-core that the tables were written for."""
MARK = "wrapped_by_megatron_slm"
"""The attribute of what has been put in a symbol's place."""

LOOP = "megatron.training.training"
ASYNC = "megatron.core.dist_checkpointing.strategies"


@dataclass(frozen=True)
class Hook:
    """A symbol that is replaced, and by what."""

    where: str
    """The module or class that has it."""
    name: str
    takes: str | type
    """The function's parameters in that version, in order; or the type of what is no function."""
    reason: str
    wrap: Callable[[Any], Any]
    """Makes, from the original, what takes its place."""


@dataclass(frozen=True)
class Run:
    """What the wrappers of a training run call."""

    run_step: Callable[..., Any]
    """Called as run_step(schedule, **arguments of the schedule) in the schedule's place."""
    before_save: Callable[[int], None]
    """Called with the iteration before a checkpoint is written."""
    after_training: Callable[[int], None]
    """Called with the iteration when the training loop has come to its end, also by a signal,
    --exit-interval or --exit-duration-in-mins."""
    timed: bool
    """Whether there is a reference whose time is to be reported."""
    events: str | None
    """The directory of TensorBoard's events, if there are any."""


_runs: list[Run] = []  # the last is the one that the wrappers serve


def install_for_training(run: Run) -> None:
    """Wrap Megatron for a training run.  Call before `pretrain()`.  Called again, it wraps nothing
    twice, and the wrappers serve the run that was given last.

    Raises:
        UserError: Megatron has changed.
    """
    _runs[:] = [run]
    _install((*STEP, *CHECKPOINTS, *LOG, *DATA))


def install_for_scoring() -> None:
    """Wrap Megatron for a job that only scores.  Call before Megatron is initialized.

    Raises:
        UserError: Megatron has changed.
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
            if not left.code:  # after a whole step, on all ranks alike
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
        "reference and ranking come before a step's schedule",
        _wrap_schedule,
    ),
    Hook(
        LOOP,
        "train",
        "forward_step_func model optimizer opt_param_scheduler train_data_iterator "
        "valid_data_iterator process_non_loss_data_func config checkpointing_context "
        "non_loss_data_func",
        "the last token dump comes when training has ended",
        _wrap_train,
    ),
)
CHECKPOINTS = (
    Hook(
        LOOP,
        "save_checkpoint",
        "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far "
        "checkpointing_context",
        "no NaN is saved, a moving average is saved first, and a failure is one line",
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
        "the process that writes for --async-save ends with the run",
        checkpoints.wrap_start_writer,
    ),
    Hook(
        "megatron.training.checkpointing",
        "maybe_msc",
        MaybeMultiStorageClient,
        "the tracker file names a checkpoint that is whole, at any moment",
        lambda original: checkpoints.WholeTrackers(),
    ),
    Hook(
        f"{ASYNC}.filesystem_async",
        "get_write_results_queue",
        "mp_mode",
        "a save without --async-save starts no process",
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
        "a writer that was killed is not waited for",
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
        "averages below zero, and our timers, are printed too",
        lambda log: report.wrap_log(log, lambda: _run().timed),
    ),
    Hook(
        LOOP,
        "evaluate",
        "forward_step_func data_iterator model process_non_loss_data_func config verbose",
        "what is no loss has no perplexity",
        _validation.wrap_evaluate,
    ),
    Hook(
        LOOP,
        "evaluate_and_print_results",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func "
        "config verbose write_to_tensorboard",
        "what is no loss is printed after the losses",
        _validation.wrap_print,
    ),
    Hook(
        "tensorboard.summary.writer.record_writer.RecordWriter",
        "write",
        "self data",
        "a full disk ends the events, and not the run",
        lambda write: event_writer.wrap_write(write, lambda: _run().events),
    ),
)
DATA = (
    Hook(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "",
        "the wheel has them compiled, and no Makefile to compile them by",
        lambda original: lambda: None,
    ),
)
NEEDS = {"compile_helpers": "megatron.core.datasets.helpers_cpp", "write": "tensorboard"}
"""Modules without which a symbol, by its name, is left as it is."""


def _install(hooks: Iterable[Hook]) -> None:
    """Check all symbols, then wrap those that are not, and print which."""
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
    """Refuse a symbol that the tables were not written for.

    Raises:
        UserError: naming it and both versions.
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
            f"{hook.where}.{hook.name} of megatron-core {VERSION}, for which this version of "
            f"megatron-slm was written, is {expected}, and that of the installed megatron-core "
            f"{megatron.core.__version__} is {found if now is not None else 'not there'}: "
            f"install megatron-core {VERSION}"
        )
