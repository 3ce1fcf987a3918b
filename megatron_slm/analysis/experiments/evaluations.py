"""Read what the evaluation of a study's arms has found."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec

from megatron_slm.analysis.experiments.recipe import Experiment
from megatron_slm.analysis.experiments.tasks import Instance
from megatron_slm.errors import UserError
from megatron_slm.files import read_json


class _Score(msgspec.Struct):
    task: str
    metric: str
    value: float


class _Scores(msgspec.Struct):
    scores: list[_Score]


def check_evaluation(recipe: Experiment) -> None:
    """Check that the arms can be evaluated, if they are to be.

    Raises:
        UserError: lm-eval is not installed.
    """
    if recipe.evaluate and find_spec("lm_eval") is None:
        raise UserError(
            f"{recipe.name} evaluates its arms with lm-eval, which is not installed: "
            "pip install -e '.[evaluation]'"
        )


def read_scores(arm: Instance, study: Path) -> dict[str, float]:
    """Return an arm's scores by task and metric; none if it was not evaluated, or not yet.

    Args:
        arm: the arm, with one seed.
        study: directory of the experiment.

    Raises:
        UserError: the file of the scores is damaged.
    """
    found: dict[str, float] = {}
    for task in arm.recipe.evaluations([arm.task]):
        evaluation = Instance(arm.recipe, task, arm.seed)
        if evaluation.done(study):
            for one in read_json(study / evaluation.output, _Scores).scores:
                found[f"{one.task} {one.metric.partition(',')[0]}"] = one.value
    return found
