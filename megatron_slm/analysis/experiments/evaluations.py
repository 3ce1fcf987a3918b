"""Check how a study's arms are to be evaluated, and read what their evaluation has found."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec

from megatron_slm.analysis.evaluation.command import build_parser
from megatron_slm.analysis.experiments.recipe import Experiment
from megatron_slm.analysis.experiments.tasks import Instance
from megatron_slm.errors import UserError
from megatron_slm.files import read_json

GIVEN = {"--model": "an arm", "--output": "its scores"}  # by the study


class _Score(msgspec.Struct):
    task: str
    metric: str
    value: float | None


class _Scores(msgspec.Struct):
    scores: list[_Score]


def check_evaluation(recipe: Experiment) -> None:
    """Check that the arms can be evaluated, if they are to be, before hours of training.

    Raises:
        UserError: lm-eval is not installed, or the recipe's arguments for it are wrong.
    """
    if not recipe.evaluate:
        return
    if find_spec("lm_eval") is None:
        raise UserError(
            f"{recipe.name} evaluates its arms with lm-eval, which is not installed: "
            "pip install -e '.[evaluation]'"
        )
    for option in GIVEN:
        if any(word.partition("=")[0] == option for word in recipe.evaluate):
            raise UserError(
                f"{recipe.name}: evaluate: the study itself gives {option}; leave it out"
            )
    given = [word for option, what in GIVEN.items() for word in (option, what)]
    try:
        build_parser().parse_args([*given, *recipe.evaluate])
    except UserError as error:
        raise UserError(f"{recipe.name}: evaluate: {error}") from error


def read_scores(arm: Instance, study: Path) -> dict[str, float]:
    """Return an arm's scores by task and metric, with lm-eval's filter if there is one; none if it
    was not evaluated, or not yet.

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
                if one.value is not None:
                    found[f"{one.task} {one.metric.removesuffix(',none')}"] = one.value
    return found
