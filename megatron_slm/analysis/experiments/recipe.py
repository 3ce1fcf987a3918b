"""Read an experiment's recipe, a YAML file with these keys:

    name, target     the study's name, and a description of the target domain
    seeds            values of Megatron's --seed, such as [1, 2, 3]; they also set the data's order
    ranks            number of ranks of every pretraining run (default: 1)
    arguments        arguments of every pretraining run
    training         further arguments of all arms and score caches
    stages           by name, what runs depend on; each has exactly one of
                       run       commands that run one after the other
                       pretrain  arguments for megatron_slm.pretrain
                       score     arguments for tools/score_reference.py, after those of the arms
    arms             by name, `clm` among them: a description, arguments, and seeds, if it is to
                     run with only some of them
    evaluate         arguments for tools/evaluate.py, if the arms are to be evaluated with lm-eval
    extends          a recipe to build on: stages and arms are merged into its own by name, and
                     arguments are appended to its own

In all texts {NAME} stands for what a stage made (directory, checkpoint or cache), {out} for what
the task itself makes, {root} for this repository, and {seed} for the seed.  A task waits for the
stages that it names.  A stage is made once per seed if it names {seed} or another such stage.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from megatron_slm.errors import UserError
from megatron_slm.files import read_yaml

BASELINE = "clm"
MOST_EXTENDED = 20  # recipes in a chain
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")
BUILT_IN = {"out", "root", "seed"}

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")

Seed = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]  # the range of Megatron's --seed


class StageEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A stage as the file has it: exactly one of the fields is set."""

    run: str | list[str] | UnsetType = UNSET
    pretrain: str | UnsetType = UNSET
    score: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        if sum(each is not UNSET for each in (self.run, self.pretrain, self.score)) != 1:
            raise ValueError("a stage needs exactly one of run, pretrain, score")


class ArmEntry(msgspec.Struct, forbid_unknown_fields=True):
    """An arm as the file has it."""

    description: str = ""
    arguments: str | None = None
    seeds: Annotated[list[Seed], msgspec.Meta(min_length=1)] | UnsetType = UNSET


class ExperimentFile(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a recipe's file.

    A stage or an arm that is null removes the one of that name from the recipe that is extended.
    """

    name: str | UnsetType = UNSET
    target: str | UnsetType = UNSET
    seeds: Annotated[list[Seed], msgspec.Meta(min_length=1)] | UnsetType = UNSET
    ranks: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    arguments: str | None = None
    training: str | None = None
    stages: dict[str, Any] | None = None  # values: StageEntry or null, as ArmEntry for arms
    arms: dict[str, Any] | None = None
    evaluate: str | UnsetType = UNSET
    extends: str | UnsetType = UNSET


@dataclass(frozen=True)
class ExperimentTask:
    """A stage or an arm of the recipe."""

    name: str
    """The recipe's name for it."""

    kind: Literal["run", "pretrain", "score", "arm", "evaluate"]
    """What it runs; an arm is a pretraining run, and the evaluation of one has its name."""

    commands: tuple[tuple[str, ...], ...]
    """The words of each command, with placeholders."""

    description: str = ""
    """For an arm, what it is."""

    seeds: tuple[int, ...] = ()
    """For an arm, the seeds that it runs with."""

    @property
    def words(self) -> Iterator[str]:
        """The words of all commands."""
        for command in self.commands:
            yield from command

    @cached_property
    def names(self) -> frozenset[str]:
        """The names in braces that occur in the commands."""
        return frozenset(name for word in self.words for name in PLACEHOLDER.findall(word))

    @property
    def stages(self) -> list[str]:
        """The names of the stages that the commands name."""
        return sorted(self.names - BUILT_IN)


@dataclass(frozen=True)
class Experiment:
    """A recipe after it was checked and merged with those that it extends."""

    name: str
    """Name of the study."""

    target: str
    """Description of the target domain."""

    seeds: tuple[int, ...]
    """Values of Megatron's --seed."""

    ranks: int
    """Number of ranks of every pretraining run."""

    stages: dict[str, ExperimentTask]
    """The stages by name, in an order in which they can be made."""

    arms: dict[str, ExperimentTask]
    """The arms by name, the baseline among them."""

    evaluate: tuple[str, ...]
    """The words of the arguments for evaluating an arm; none if arms are not evaluated."""

    def evaluations(self, arms: Sequence[ExperimentTask]) -> list[ExperimentTask]:
        """Return the evaluations of some arms, if the recipe has any."""
        commands = (self.evaluate,)
        return [ExperimentTask(arm.name, "evaluate", commands) for arm in arms if self.evaluate]

    def needs(self, task: ExperimentTask) -> dict[str, ExperimentTask]:
        """Return the stages that a task depends on, directly or not, in order."""
        wanted = set(task.stages)
        for name, stage in reversed(self.stages.items()):
            if name in wanted:
                wanted |= set(stage.stages)
        return {name: stage for name, stage in self.stages.items() if name in wanted}

    def per_seed(self, task: ExperimentTask) -> bool:
        """Return whether a task is run once for each seed."""
        return task.kind in ("arm", "score", "evaluate") or any(
            "seed" in one.names or one.kind == "score" for one in (task, *self.needs(task).values())
        )


def read_experiment(path: Path) -> Experiment:
    """Read and check a recipe.

    Raises:
        UserError: there is no such file, or something is wrong with it.
    """
    content = _extended(path, ())
    if content.seeds is UNSET:
        raise UserError(
            f"{path}: a recipe needs seeds, a list of whole numbers; one without can only be "
            "extended by others"
        )
    seeds = tuple(dict.fromkeys(content.seeds))
    common = _words(path, "arguments", content.arguments)
    training = (*common, *_words(path, "training", content.training))
    stages: dict[str, ExperimentTask] = {}
    for name, stage in _entries(path, "stage", content.stages, StageEntry):
        stages[name] = task = _stage(path, name, stage, common, training)
        _check_names(path, task, stages.keys() - {name})
    arms = {}
    for name, arm in _entries(path, "arm", content.arms, ArmEntry):
        words = (*training, *_words(path, f"arm {name}", arm.arguments))
        own = seeds if arm.seeds is UNSET else tuple(dict.fromkeys(arm.seeds))
        if unknown := [seed for seed in own if seed not in seeds]:
            raise UserError(f"{path}: arm {name}: seed {unknown[0]} is not among the seeds above")
        arms[name] = ExperimentTask(name, "arm", (words,), arm.description, own)
        _check_names(path, arms[name], stages)
    evaluate = () if content.evaluate is UNSET else _words(path, "evaluate", content.evaluate)
    _check_names(path, ExperimentTask("", "evaluate", (evaluate,)), stages)
    if BASELINE not in arms:
        raise UserError(f"{path}: no arm is named {BASELINE}, with which the others are compared")
    if arms[BASELINE].seeds != seeds:
        raise UserError(f"{path}: arm {BASELINE} has to run with every seed")
    return Experiment(
        name=path.stem if content.name is UNSET else content.name,
        target="" if content.target is UNSET else content.target,
        seeds=seeds,
        ranks=1 if content.ranks is UNSET else content.ranks,
        stages=stages,
        arms=arms,
        evaluate=evaluate,
    )


def _extended(path: Path, above: tuple[Path, ...]) -> ExperimentFile:
    """Read a file and merge it into the recipe that it extends.

    Args:
        path: the file.
        above: the files that extend it, from the first one read.
    """
    content = read_yaml(path, ExperimentFile)
    if content.extends is UNSET:
        return content
    parent = (path.parent / content.extends).resolve()
    if parent in (*above, path.resolve()):
        raise UserError(f"{path}: it extends itself, by way of {parent}")
    if len(above) == MOST_EXTENDED:
        raise UserError(f"{path}: more than {MOST_EXTENDED} recipes extend each other")
    return _over(_extended(parent, (*above, path.resolve())), content)


def _over(parent: ExperimentFile, own: ExperimentFile) -> ExperimentFile:
    merged = msgspec.structs.replace(
        parent,
        **{
            name: value
            for name in ("name", "target", "seeds", "ranks", "evaluate")
            if (value := getattr(own, name)) is not UNSET
        },
    )
    for name in ("arguments", "training"):  # where an option occurs twice, the last one counts
        texts = [text for text in (getattr(parent, name), getattr(own, name)) if text is not None]
        setattr(merged, name, " ".join(texts) if texts else None)
    for name in ("stages", "arms"):
        both = (getattr(parent, name) or {}) | (getattr(own, name) or {})
        setattr(merged, name, {key: one for key, one in both.items() if one is not None})
    return merged


def _entries[T: msgspec.Struct](
    path: Path, what: str, entries: dict[str, Any] | None, kind: type[T]
) -> Iterator[tuple[str, T]]:
    for name, entry in (entries or {}).items():
        if not NAME.fullmatch(name) or name in BUILT_IN:
            raise UserError(f"{path}: {name!r} cannot be a name in {what}s")
        try:
            yield name, msgspec.convert(entry, kind)
        except msgspec.ValidationError as error:
            known = ", ".join(kind.__struct_fields__)
            raise UserError(f"{path}: {what} {name}: {error}; known: {known}") from error


def _stage(
    path: Path,
    name: str,
    entry: StageEntry,
    common: tuple[str, ...],
    training: tuple[str, ...],
) -> ExperimentTask:
    where = f"stage {name}"
    kind: Literal["run", "pretrain", "score"]
    if entry.run is not UNSET:
        kind = "run"
        lines = entry.run if isinstance(entry.run, list) else [entry.run]
        commands = [_words(path, where, line) for line in lines]
    elif entry.pretrain is not UNSET:
        kind = "pretrain"
        commands = [(*common, *_words(path, where, entry.pretrain))]
    else:
        assert entry.score is not UNSET
        kind = "score"
        commands = [(*training, *_words(path, where, entry.score))]
    if not all(commands) or not commands:
        raise UserError(f"{path}: {where} has nothing to run")
    return ExperimentTask(name, kind, tuple(commands))


def _words(path: Path, where: str, text: str | None) -> tuple[str, ...]:
    try:
        if "\0" in (text or "").encode().decode():  # surrogates cannot be encoded
            raise ValueError("no command can have a NUL character")
        return tuple(shlex.split(text or "", comments=True))
    except ValueError as error:
        raise UserError(f"{path}: {where}: {error}") from error


def _check_names(path: Path, task: ExperimentTask, known: Any) -> None:
    what = f"{task.kind if task.kind in ('arm', 'evaluate') else 'stage'} {task.name}".strip()
    for name in task.stages:
        if name not in known:
            raise UserError(f"{path}: {what} names {{{name}}}, which no stage before it is")
