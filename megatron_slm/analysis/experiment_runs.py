"""What a run of an experiment did, from its TensorBoard events and its checkpoint's arguments.

FLOPs are by megatron_slm/planning/formulas.py, validation left out:

    policy               the run's own steps
    scoring              a forward of every reference on every token, by the run or a score cache
    reference_training   all pretraining that this arm needs and the baseline does not
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from megatron_slm.analysis.experiment_recipe import BASELINE
from megatron_slm.analysis.experiment_results import RunResult
from megatron_slm.analysis.experiment_tasks import Instance
from megatron_slm.analysis.report.run_files import VALIDATION
from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_megatron
from megatron_slm.model.torch_dist import TorchDistReader, iteration_directory
from megatron_slm.planning.formulas import forward_flops, step_flops
from megatron_slm.planning.recipe import work_of


def read_run(instance: Instance, study: Path) -> RunResult:
    """Raises: UserError: the run has logged no validation."""
    directory = study / instance.directory
    args = _arguments(study / instance.output)
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    logged = {
        tag: {event.step: event.value for event in events.Scalars(tag)}  # resumed: the last
        for tag in events.Tags()["scalars"]
    }
    validations = list(filter(VALIDATION.fullmatch, logged))  # of several sets the first counts
    if not validations:
        raise UserError(f"{directory}: no validation was logged: give --eval-interval and data")
    tokens = args.global_batch_size * args.seq_length
    # A run that selects nothing logs no ratio: all tokens.
    ratios = logged.get("selected ratio", {})
    steps = range(1, args.train_iters + 1)
    selected = sum(ratios.get(step, 1.0) for step in steps)
    curve = sorted((step, step * tokens, loss) for step, loss in logged[validations[0]].items())
    return RunResult(
        directory=str(instance.directory),
        curve=tuple(curve),
        tokens_seen=args.train_iters * tokens,
        tokens_selected=round(selected * tokens),
        flops={
            "policy": _training_flops(args, selected / args.train_iters),
            "reference_training": _reference_training(instance, study),
            "scoring": _scoring(instance, study, args),
        },
        # Each is the mean of the log interval that ends there.
        wall_seconds=sum(logged.get("iteration-time", {}).values()) * args.log_interval,
    )


def _arguments(checkpoints: Path) -> Namespace:
    """Those of the run that saved the latest."""
    return TorchDistReader(iteration_directory(checkpoints, None, "--save", "--save")).arguments


def _architecture(args: Namespace) -> Architecture:
    return from_megatron(args, args.padded_vocab_size, "a run")


def _training_flops(args: Namespace, ratio: float) -> int:
    """Of a whole run, but for references."""
    work = replace(work_of(args, "plain", "cpu"), ratio=ratio)  # neither matters for FLOPs
    return step_flops(_architecture(args), [], work) * args.train_iters


def _reference_training(instance: Instance, study: Path) -> int:
    recipe = instance.recipe
    shared = recipe.needs(recipe.arms[BASELINE])
    own = (
        Instance(recipe, stage, instance.seed if recipe.per_seed(stage) else None)
        for name, stage in recipe.needs(instance.task).items()
        if name not in shared and stage.kind == "pretrain"
    )
    runs = (_arguments(study / one.output) for one in own)
    return sum(_training_flops(args, args.slm_token_ratio) for args in runs)


def _scoring(instance: Instance, study: Path, args: Namespace) -> int:
    """From what its own arguments, and those of its score caches, load as references."""
    scoring = [instance, *(one for one in instance.inputs if one.task.kind == "score")]
    loads = [load for one in scoring for load in _references(one, study)]
    models = [_arguments(study / load.rpartition("=")[2]) for load in loads]
    if args.slm_reference is not None:  # the policy's moving average
        models.append(args)
    tokens = args.train_iters * args.global_batch_size * args.seq_length
    return sum(
        sum(forward_flops(model, tokens, args.seq_length))
        + 2 * tokens * model.hidden * one.padded_vocab_size
        for one, model in ((one, _architecture(one)) for one in models)
    )


def _references(instance: Instance, study: Path) -> list[str]:
    """What follows --slm-reference-load in its command."""
    (words,) = instance.commands(study)
    if "--slm-reference-load" not in words:
        return []
    after = words[words.index("--slm-reference-load") + 1 :]
    end = next((at for at, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]
