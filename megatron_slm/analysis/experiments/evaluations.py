"""Check how a study's arms are to be evaluated, and read what their evaluation has found."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec

from megatron_slm.analysis.evaluation.benchmarks import benchmarks
from megatron_slm.analysis.evaluation.command import build_parser
from megatron_slm.analysis.experiments.recipe import Experiment
from megatron_slm.analysis.experiments.tasks import Instance, tasks_directory
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

    Names of tasks are looked up only if the directory of the recipe's own tasks is there already,
    and is not made by a stage.

    Raises:
        UserError: lm-eval is not installed, it has no such task, or the recipe's arguments for it
            are wrong.
    """
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
        args = build_parser().parse_args([*given, *recipe.evaluate])
        include = tasks_directory(recipe.evaluate)
        if include is None or include.is_absolute():  # otherwise it is in the study's directory
            from megatron_slm.analysis.evaluation.evaluate import check_tasks  # imports torch

            check_tasks(benchmarks(args.tasks), include, args.run_generated_code)
    except UserError as error:
        raise UserError(f"{recipe.name}: evaluate: {error}") from error


def read_scores(arm: Instance, study: Path) -> dict[str, float]:
    """Return an arm's scores by task and metric, with lm-eval's filter if there is one; none if it
    was not evaluated, or not yet.

    Args:
        arm: the arm, with one seed.
        study: directory of the experiment.

    Raises:
        UserError: the file of the scores is damaged or gone.
    """
    found: dict[str, float] = {}
    for task in arm.recipe.evaluations([arm.task]):
        evaluation = Instance(arm.recipe, task, arm.seed)
        if evaluation.done(study):
            try:
                scores = read_json(study / evaluation.output, _Scores).scores
            except UserError as error:
                where = study / evaluation.directory
                raise UserError(f"{error}; remove {where} to have it evaluated again") from error
            for one in scores:
                if one.value is not None:
                    found[f"{one.task} {one.metric.removesuffix(',none')}"] = one.value
    return found
