"""Add to Megatron's log what it leaves out, averages below zero and our own timers.

Also take out of it what does not belong there: Megatron reports the exponential of everything that
validation reports as a perplexity, but ratios, thresholds and differences of losses have none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.training import get_args, get_tensorboard_writer, get_timers
from megatron.training.global_vars import get_wandb_writer
from megatron.training.utils import print_rank_last

from megatron_slm.training.device_timer import device_timer
from megatron_slm.training.validation_sets import whole_sets

TIMERS = ["slm-reference", "slm-ranking", "slm-dump"]
# How the names of reported values begin that are not losses.
NO_LOSSES = ("selected ratio", "threshold", "excess loss")


def wrap_log(training_log: Callable[..., Any], timed: Callable[[], bool]) -> Callable[..., Any]:
    """Wrap Megatron's `training_log`: print what its line leaves out on a line after it.

    Args:
        training_log: the original.
        timed: tells whether there is a reference whose share of a step's time is to be reported.
    """

    @functools.wraps(training_log)
    def log(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        first = kwargs.get("is_first_iteration", False)
        due = iteration % get_args().log_interval == 0 or first
        before = dict(total_loss_dict)  # Megatron resets it when it prints
        share = _reference_share() if due and timed() else None
        result = training_log(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            loss_scale,
            report_memory_flag,
            skipped_iter,
            *args,
            **kwargs,
        )
        if due:
            left_out = _negative_averages(before, {} if skipped_iter else loss_dict)
            if share is not None:
                _write("reference time share", share, iteration)
                left_out["reference time share"] = share
            if left_out:
                values = "".join(f" {name}: {value:.6E} |" for name, value in left_out.items())
                print_rank_last(f" iteration {iteration:8d} |{values}")
            # Prints the timers that ran, with the time of one iteration.
            get_timers().log(TIMERS, normalizer=get_args().log_interval, reset=not first)
        return result

    return log


class Validation:
    """Wrappers that take values which are not losses out of Megatron's validation results, and
    report them afterwards."""

    def __init__(self) -> None:
        self.taken: list[dict[str, float]] = []
        """The values taken out, averages by name, for each validation set."""

    def wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `evaluate`: leave only losses in its results."""

        @functools.wraps(evaluate)
        def evaluate_losses(*args: Any, **kwargs: Any) -> Any:
            averages, *rest = evaluate(*args, **kwargs)
            names = [name for name in averages or {} if name.startswith(NO_LOSSES)]
            self.taken.append({name: averages.pop(name).item() for name in names})
            return averages, *rest

        return evaluate_losses

    def wrap_print(self, evaluate_and_print: Callable[..., None]) -> Callable[..., None]:
        """Wrap Megatron's `evaluate_and_print_results`: report afterwards what was taken out."""

        @functools.wraps(evaluate_and_print)
        def evaluate_and_print_all(
            prefix: str,
            forward_step: Any,
            data_iterator: Any,
            model: Any,
            iteration: int,
            *args: Any,
            write_to_tensorboard: bool = True,
            **kwargs: Any,
        ) -> None:
            self.taken.clear()
            if get_args().full_validation:
                data_iterator = whole_sets(data_iterator)
            written = {"write_to_tensorboard": write_to_tensorboard}
            evaluate_and_print(
                prefix, forward_step, data_iterator, model, iteration, *args, **written, **kwargs
            )
            self._report(prefix, iteration, write_to_tensorboard)

        return evaluate_and_print_all

    def _report(self, prefix: str, iteration: int, write_to_tensorboard: bool) -> None:
        names = get_args().validation_set_names or range(len(self.taken))
        for name, averages in zip(names, self.taken, strict=False):
            part = f"validation-{name}" if get_args().multiple_validation_sets else "validation"
            values = "".join(f" {key} value: {value:.6E} |" for key, value in averages.items())
            if values:
                print_rank_last(f" {part} at {prefix} |{values}")
            if write_to_tensorboard:
                for key, value in averages.items():
                    _write(f"{key} {part}", value, iteration)


def _reference_share() -> float:
    """Return the share of the log interval's time that the reference's passes took."""
    reference = device_timer("slm-reference").elapsed(reset=False)
    return float(reference / get_timers()("interval-time").elapsed(reset=False))


def _write(name: str, value: float, iteration: int) -> None:
    if (tensorboard := get_tensorboard_writer()) is not None:
        tensorboard.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log({name: value}, iteration)


def _negative_averages(before: dict[str, Any], losses: dict[str, Any]) -> dict[str, float]:
    """Return the averages over a log interval that are below zero.

    Args:
        before: the interval's sums before its last iteration.
        losses: the losses of that iteration.
    """
    iterations = before.get("advanced iterations", 0) + bool(losses)
    averages = {
        name: (float(before.get(name, 0.0)) + float(losses.get(name, 0.0))) / max(1, iterations)
        for name in losses.keys() | before.keys()
    }
    return {name: average for name, average in averages.items() if average < 0.0}
