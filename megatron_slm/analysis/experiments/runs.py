"""Measure a run of an experiment from its TensorBoard events and its checkpoint's arguments.

FLOPs come from megatron_slm/planning/formulas.py and leave validation out:

    policy               the run's own steps
    scoring              a forward pass of every reference over every token, by the run or by a
                         score cache; the run does none during a warm-up
    reference_training   all pretraining that this arm depends on and the baseline does not
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from itertools import accumulate, pairwise
from math import isfinite
from pathlib import Path

from megatron_slm.analysis.event_files import VALIDATION, read_events
from megatron_slm.analysis.experiments.recipe import BASELINE
from megatron_slm.analysis.experiments.results import Point, RunResult
from megatron_slm.analysis.experiments.tasks import Instance
from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_megatron
from megatron_slm.model.torch_dist import TorchDistReader, iteration_directory
from megatron_slm.planning.documents import document_length
from megatron_slm.planning.formulas import forward_flops, step_flops
from megatron_slm.planning.recipe import work_of
from megatron_slm.training.command_line.options import OF_SCORES


def measure_run(instance: Instance, study: Path) -> RunResult:
    """Measure the curve, the cost and the step time of a run that is complete.

    Raises:
        UserError: the run logged no validation or a loss that is not finite, or a file is damaged.
    """
    directory = study / instance.directory
    args = _arguments(study / instance.output)
    logged = read_events(directory / "tensorboard").scalars
    # The first set is the target.
    validations = [tag for tag in logged if VALIDATION.fullmatch(tag)]
    if not validations:
        raise UserError(f"{directory}: no validation was logged: give --eval-interval and data")
    for tag in ("lm loss", "iteration-time"):
        if tag not in logged:
            raise UserError(
                f"{directory}/tensorboard has no {tag!r}: remove {directory} to run it again"
            )
    tokens = args.global_batch_size * args.seq_length
    # A run that does not select, or not yet, logs no ratio: it trains on all tokens.  So do soft
    # weights.
    ratios, scored = logged.get("selected ratio", {}), logged.get("reference loss", {})
    soft = args.slm_weighting in OF_SCORES or args.slm_unselected_weight > 0
    steps = range(1, args.train_iters + 1)
    trained = [1.0 if soft else ratios.get(step, 1.0) for step in steps]
    policy = [
        _step_flops(args, ratio, step in ratios) for step, ratio in zip(steps, trained, strict=True)
    ]
    cached, online = _scoring(instance, study, args)
    scoring = [cached + online * (step in scored) for step in steps]
    spent = [list(accumulate(each)) for each in (trained, policy, scoring)]
    curve = []
    for step, loss in logged[validations[0]].items():
        if not (isfinite(loss) and 1 <= step <= args.train_iters):
            raise UserError(
                f"{directory}: the validation loss at iteration {step} of {args.train_iters} is "
                f"{loss}; remove the directory to run it again, or the arm from the recipe"
            )
        selected, *flops = (each[step - 1] for each in spent)
        curve.append(Point(step, step * tokens, loss, round(selected * tokens), *map(round, flops)))
    first = logged["lm loss"] | logged.get("all-token loss", {})
    return RunResult(
        directory=str(instance.directory),
        curve=tuple(curve),
        reference_training=_reference_training(instance, study),
        step_seconds=_step_seconds(logged["iteration-time"]),
        first_loss=first.get(1),
        others={tag.removeprefix("lm loss validation-"): logged[tag] for tag in validations[1:]},
    )


def _step_seconds(times: dict[int, float]) -> float:
    """Return the mean time of a step from the means of the log intervals.

    Args:
        times: mean seconds of a step, by the last iteration of each interval.
    """
    ends = [0, *sorted(times)]
    total = sum((end - start) * times[end] for start, end in pairwise(ends))
    return total / ends[-1]


def _arguments(checkpoints: Path) -> Namespace:
    """Return the arguments of the run that saved the latest checkpoint of a directory."""
    return TorchDistReader(iteration_directory(checkpoints, None, "--save", "--save")).arguments


def _architecture(args: Namespace) -> Architecture:
    return from_megatron(args, args.padded_vocab_size, "a run")


def _step_flops(args: Namespace, ratio: float, selects: bool) -> int:
    """Return the FLOPs of a step, without those of references."""
    work = work_of(args, "plain", "cpu")  # neither matters for FLOPs
    work = replace(work, ratio=ratio, ranks_first=work.ranks_first and selects)
    return step_flops(_architecture(args), [], work)


def _reference_training(instance: Instance, study: Path) -> int:
    """Return the FLOPs of all pretraining that a run depends on and the baseline does not."""
    recipe = instance.recipe
    shared = recipe.needs(recipe.arms[BASELINE])
    own = (
        Instance(recipe, stage, instance.seed if recipe.per_seed(stage) else None)
        for name, stage in recipe.needs(instance.task).items()
        if name not in shared and stage.kind == "pretrain"
    )
    runs = (_arguments(study / one.output) for one in own)
    return sum(_step_flops(args, args.slm_token_ratio, True) * args.train_iters for args in runs)


def _scoring(instance: Instance, study: Path, args: Namespace) -> tuple[int, int]:
    """Return the FLOPs of scoring a step's tokens by score caches and by the run itself.

    Score caches have every step's tokens; the run itself scores only the steps that select.
    """
    caches = [one for one in instance.inputs if one.task.kind == "score"]
    cached = [load for cache in caches for load in _references(cache, study)]
    online = _references(instance, study)
    stored, run = ([_arguments(study / load) for load in loads] for loads in (cached, online))
    if args.slm_reference is not None:  # the policy's moving average
        run.append(args)
    tokens = args.global_batch_size * args.seq_length
    attended = document_length(args) or args.seq_length

    def flops(models: list[Namespace]) -> int:
        return sum(
            sum(forward_flops(_architecture(model), tokens, attended))
            + 2 * tokens * model.hidden_size * model.padded_vocab_size
            for model in models
        )

    return flops(stored), flops(run)


def _references(instance: Instance, study: Path) -> list[str]:
    """Return the directories that a task's --slm-reference-load names."""
    (words,) = instance.commands(study)
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--slm-reference-load", nargs="+", default=[])
    loads = parser.parse_known_args(words)[0].slm_reference_load
    return [load.rpartition("=")[2] for load in loads]
