"""What an experiment's recipe (YAML) says.

    name, target     of the study, and what the target domain is, in words
    seeds            [1, 2, 3]: of Megatron's --seed, and so of the data's order
    ranks            of every pretraining run (default: 1)
    arguments        of every pretraining run
    training         further ones, of all arms and of score caches
    stages           what runs need, by name; each has one of
                       run       commands, one after the other
                       pretrain  arguments of a run of megatron_slm.pretrain
                       score     arguments of tools/score_reference.py, after those of the arms
    arms             by name, `clm` among them: description, arguments
    extends          another recipe: its mappings are filled up, its arguments come before

In all texts {NAME} is what a stage made (directory, checkpoint or cache), {out} the stage's own,
{root} this repository and {seed} the seed.  Who names a stage waits for it; a stage that names
{seed}, or another that does, is made for each seed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from megatron_slm.errors import UserError
from megatron_slm.files import read_yaml

BASELINE = "clm"
MOST_EXTENDED = 20  # recipes, one upon the other
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")
BUILT_IN = {"out", "root", "seed"}

NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")

Seed = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]  # Megatron's


class StageEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A stage in the file: one of the three."""

    run: str | list[str] | UnsetType = UNSET
    pretrain: str | UnsetType = UNSET
    score: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        if sum(each is not UNSET for each in (self.run, self.pretrain, self.score)) != 1:
            raise ValueError("a stage has one of run, pretrain, score")


class ArmEntry(msgspec.Struct, forbid_unknown_fields=True):
    """An arm in the file."""

    description: str = ""
    arguments: str | None = None


class ExperimentFile(msgspec.Struct, forbid_unknown_fields=True):
    """What a file says; a stage or an arm that is null leaves that of the extended recipe out."""

    name: str | UnsetType = UNSET
    target: str | UnsetType = UNSET
    seeds: Annotated[list[Seed], msgspec.Meta(min_length=1)] | UnsetType = UNSET
    ranks: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | UnsetType = UNSET
    arguments: str | None = None
    training: str | None = None
    stages: dict[str, Any] | None = None  # of StageEntry, ArmEntry or null
    arms: dict[str, Any] | None = None
    extends: str | UnsetType = UNSET


@dataclass(frozen=True)
class ExperimentTask:
    """A stage, or an arm, which is a pretraining run like others.

    commands: words of each, with placeholders.
    """

    name: str
    kind: Literal["run", "pretrain", "score", "arm"]
    commands: tuple[tuple[str, ...], ...]
    description: str = ""

    @property
    def words(self) -> Iterator[str]:
        for command in self.commands:
            yield from command

    @cached_property
    def names(self) -> frozenset[str]:
        """In braces."""
        return frozenset(name for word in self.words for name in PLACEHOLDER.findall(word))

    @property
    def stages(self) -> list[str]:
        """That it names."""
        return sorted(self.names - BUILT_IN)


@dataclass(frozen=True)
class Experiment:
    """stages: in the order in which they can be made."""

    name: str
    target: str
    seeds: tuple[int, ...]
    ranks: int
    stages: dict[str, ExperimentTask]
    arms: dict[str, ExperimentTask]

    def needs(self, task: ExperimentTask) -> dict[str, ExperimentTask]:
        """Stages that a task needs, theirs included, in order."""
        wanted = set(task.stages)
        for name, stage in reversed(self.stages.items()):
            if name in wanted:
                wanted |= set(stage.stages)
        return {name: stage for name, stage in self.stages.items() if name in wanted}

    def per_seed(self, task: ExperimentTask) -> bool:
        """Whether each seed has its own."""
        return task.kind in ("arm", "score") or any(
            "seed" in one.names or one.kind == "score" for one in (task, *self.needs(task).values())
        )


def read_experiment(path: Path) -> Experiment:
    """Raises: UserError: no such file, or what is wrong with it."""
    content = _extended(path, ())
    if content.seeds is UNSET:
        raise UserError(
            f"{path}: a recipe needs seeds, a list of whole numbers; one without is there for "
            "others to extend"
        )
    common = _words(path, "arguments", content.arguments)
    training = (*common, *_words(path, "training", content.training))
    stages: dict[str, ExperimentTask] = {}
    for name, stage in _entries(path, "stage", content.stages, StageEntry):
        stages[name] = task = _stage(path, name, stage, common, training)
        _check_names(path, task, stages.keys() - {name})
    arms = {}
    for name, arm in _entries(path, "arm", content.arms, ArmEntry):
        words = (*training, *_words(path, f"arm {name}", arm.arguments))
        arms[name] = ExperimentTask(name, "arm", (words,), arm.description)
        _check_names(path, arms[name], stages)
    if BASELINE not in arms:
        raise UserError(f"{path}: no arm is named {BASELINE}, with which the others are compared")
    return Experiment(
        name=path.stem if content.name is UNSET else content.name,
        target="" if content.target is UNSET else content.target,
        seeds=tuple(dict.fromkeys(content.seeds)),
        ranks=1 if content.ranks is UNSET else content.ranks,
        stages=stages,
        arms=arms,
    )


def _extended(path: Path, above: tuple[Path, ...]) -> ExperimentFile:
    """The file's content over that of what it extends.

    Args:
        above: those that extend it.
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
            for name in ("name", "target", "seeds", "ranks")
            if (value := getattr(own, name)) is not UNSET
        },
    )
    for name in ("arguments", "training"):  # of two the last counts
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
    what = "arm" if task.kind == "arm" else "stage"
    for name in task.stages:
        if name not in known:
            raise UserError(
                f"{path}: {what} {task.name} names {{{name}}}, which no stage before it is"
            )
