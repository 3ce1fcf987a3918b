"""Make the runs of an experiment longer or shorter, for more hardware or for a trial."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_slm.analysis.experiments.recipe import Experiment, ExperimentTask
from megatron_slm.errors import UserError

# Options that count iterations or tokens; a warm-up of the learning rate stays as long as it is.
SCALED = frozenset(
    """
    --train-iters --eval-interval --save-interval --slm-warmup-tokens --slm-ratio-decay-iters
    --slm-dump-interval --lr-decay-iters
    """.split()
)
RATIO_STEP = re.compile(r"(\d+)(:.+)")  # of --slm-ratio-steps


def scaled(recipe: Experiment, scale: float) -> Experiment:
    """Multiply the numbers of iterations and tokens of all pretraining runs and score caches.

    Raises:
        UserError: one of them would not be whole.
    """
    return replace(
        recipe,
        stages={name: _scaled(stage, scale) for name, stage in recipe.stages.items()},
        arms={name: _scaled(arm, scale) for name, arm in recipe.arms.items()},
    )


def _scaled(task: ExperimentTask, scale: float) -> ExperimentTask:
    if task.kind == "run":
        return task
    (words,) = task.commands
    option, result = "", []
    for whole in words:
        start, word = "", whole
        if whole.startswith("--"):
            option, equals, value = whole.partition("=")
            if equals:  # --train-iters=20
                start, word = f"{option}=", value
        step = RATIO_STEP.fullmatch(word)
        if option in SCALED and word.isdecimal():
            word = _times(word, scale, option, task)
        elif option == "--slm-ratio-steps" and step is not None:
            word = _times(step[1], scale, option, task) + step[2]
        result.append(start + word)
    return replace(task, commands=(tuple(result),))


def _times(count: str, scale: float, option: str, task: ExperimentTask) -> str:
    number = int(count) * scale
    if number != round(number):
        raise UserError(
            f"--scale {scale:g}: {option} {count} of {task.name} would be {number:g}; take a scale "
            "that leaves whole numbers"
        )
    return str(round(number))
