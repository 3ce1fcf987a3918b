"""What Megatron's log leaves out: averages below zero, and our own timers.

And what it should leave out: of whatever validation reports it gives the exponential, as a
perplexity, which a ratio, a threshold or a difference of losses has not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.training import get_args, get_tensorboard_writer, get_timers
from megatron.training.global_vars import get_wandb_writer
from megatron.training.utils import print_rank_last

from megatron_slm.training.device_timer import device_timer

TIMERS = ["slm-reference", "slm-ranking", "slm-dump"]
# Beginnings of the names of what objective.py reports and is no loss.
NO_LOSSES = ("selected ratio", "threshold", "excess loss")


def wrap_log(training_log: Callable[..., Any], timed: Callable[[], bool]) -> Callable[..., Any]:
    """Return Megatron's `training_log`, which then prints, after its line, what that leaves out.

    Args:
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
        before = dict(total_loss_dict)  # which Megatron resets when it prints
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
            # Those of them that ran; the time is that of one iteration.
            get_timers().log(TIMERS, normalizer=get_args().log_interval, reset=not first)
        return result

    return log


class Validation:
    """Wrappers that take what is no loss from the results of Megatron's validation, and report it
    after them."""

    def __init__(self) -> None:
        self.taken: list[dict[str, float]] = []
        """Averages of what is no loss, of each validation set."""

    def wrap_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Return Megatron's `evaluate`, whose averages are of losses alone."""

        @functools.wraps(evaluate)
        def evaluate_losses(*args: Any, **kwargs: Any) -> Any:
            averages, *rest = evaluate(*args, **kwargs)
            names = [name for name in averages or {} if name.startswith(NO_LOSSES)]
            self.taken.append({name: averages.pop(name).item() for name in names})
            return averages, *rest

        return evaluate_losses

    def wrap_print(self, evaluate_and_print: Callable[..., None]) -> Callable[..., None]:
        """Return Megatron's `evaluate_and_print_results`, which then reports what was taken."""

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
    """Time of the reference's passes over that of the log interval's steps."""
    reference = device_timer("slm-reference").elapsed(reset=False)
    return float(reference / get_timers()("interval-time").elapsed(reset=False))


def _write(name: str, value: float, iteration: int) -> None:
    if (tensorboard := get_tensorboard_writer()) is not None:
        tensorboard.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log({name: value}, iteration)


def _negative_averages(before: dict[str, Any], losses: dict[str, Any]) -> dict[str, float]:
    """Averages below zero over a log interval, given its sums before the last iteration, and that
    iteration's losses."""
    iterations = before.get("advanced iterations", 0) + bool(losses)
    averages = {
        name: (float(before.get(name, 0.0)) + float(losses.get(name, 0.0))) / max(1, iterations)
        for name in losses.keys() | before.keys()
    }
    return {name: average for name, average in averages.items() if average < 0.0}
