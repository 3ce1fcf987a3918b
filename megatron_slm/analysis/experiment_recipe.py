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
from typing import Any, Literal, cast

import yaml

from megatron_slm.errors import UserError

BASELINE = "clm"
KINDS = ("run", "pretrain", "score")
KNOWN = {"name", "target", "seeds", "ranks", "arguments", "training", "stages", "arms", "extends"}
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")
BUILT_IN = {"out", "root", "seed"}
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Task:
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
class Recipe:
    """stages: in the order in which they can be made."""

    name: str
    target: str
    seeds: tuple[int, ...]
    ranks: int
    stages: dict[str, Task]
    arms: dict[str, Task]

    def needs(self, task: Task) -> dict[str, Task]:
        """Stages that a task needs, theirs included, in order."""
        wanted = set(task.stages)
        for name, stage in reversed(self.stages.items()):
            if name in wanted:
                wanted |= set(stage.stages)
        return {name: stage for name, stage in self.stages.items() if name in wanted}

    def per_seed(self, task: Task) -> bool:
        """Whether each seed has its own."""
        return task.kind in ("arm", "score") or any(
            "seed" in one.names or one.kind == "score" for one in (task, *self.needs(task).values())
        )


def read_recipe(path: Path) -> Recipe:
    """Raises: UserError: no such file, or what is wrong with it."""
    content = _extended(path, ())
    if unknown := sorted(content.keys() - KNOWN):
        raise UserError(f"{path}: a recipe has no {', '.join(unknown)}")
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(one) is int for one in seeds):
        raise UserError(f"{path}: seeds is a list of whole numbers, not {seeds!r}")
    ranks = content.get("ranks", 1)
    if type(ranks) is not int or ranks < 1:
        raise UserError(f"{path}: ranks is a whole number above 0, not {ranks!r}")
    common = _words(path, "arguments", content.get("arguments"))
    training = (*common, *_words(path, "training", content.get("training")))
    stages: dict[str, Task] = {}
    for name, entry in _entries(path, content, "stages"):
        stages[name] = task = _stage(path, name, entry, common, training)
        _check_names(path, task, stages.keys() - {name})
    arms = {}
    for name, entry in _entries(path, content, "arms"):
        where = f"{path}: arm {name}"
        if not isinstance(entry, dict) or not entry.keys() <= {"description", "arguments"}:
            raise UserError(f"{where} has description and arguments, no other")
        words = (*training, *_words(path, f"arm {name}", entry.get("arguments")))
        arms[name] = Task(name, "arm", (words,), str(entry.get("description", "")))
        _check_names(path, arms[name], stages)
    if BASELINE not in arms:
        raise UserError(f"{path}: no arm is named {BASELINE}, with which the others are compared")
    return Recipe(
        name=str(content.get("name", path.stem)),
        target=str(content.get("target", "")),
        seeds=tuple(dict.fromkeys(seeds)),
        ranks=ranks,
        stages=stages,
        arms=arms,
    )


def _extended(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The file's content over that of what it extends."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}".replace("\n", " ")) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping")
    if "extends" not in content:
        return content
    parent = (path.parent / str(content.pop("extends"))).resolve()
    if parent in below:
        raise UserError(f"{path}: it extends itself, by way of {parent}")
    return _over(_extended(parent, (*below, path.resolve())), content)


def _over(parent: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for name, value in own.items():
        before = parent.get(name)
        if name in ("arguments", "training") and before is not None:
            merged[name] = f"{before} {value}"  # of two the last counts
        elif name in ("stages", "arms") and isinstance(before, dict) and isinstance(value, dict):
            merged[name] = {key: one for key, one in (before | value).items() if one is not None}
        else:
            merged[name] = value
    return merged


def _entries(path: Path, content: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    entries = content.get(key) or {}
    if not isinstance(entries, dict):
        raise UserError(f"{path}: {key} is a mapping of names")
    for name, entry in entries.items():
        if not NAME.fullmatch(str(name)) or name in BUILT_IN:
            raise UserError(f"{path}: {name!r} cannot be a name in {key}")
        yield str(name), entry


def _stage(
    path: Path, name: str, entry: Any, common: tuple[str, ...], training: tuple[str, ...]
) -> Task:
    if not isinstance(entry, dict) or len(entry) != 1 or not entry.keys() <= set(KINDS):
        raise UserError(f"{path}: stage {name} has one of {', '.join(KINDS)}")
    ((kind, text),) = entry.items()
    where = f"stage {name}"
    if kind == "run":
        lines = text if isinstance(text, list) else [text]
        commands = [_words(path, where, line) for line in lines]
    else:
        before = common if kind == "pretrain" else training
        commands = [(*before, *_words(path, where, text))]
    if not all(commands) or not commands:
        raise UserError(f"{path}: {where} has nothing to run")
    kind = cast(Literal["run", "pretrain", "score"], kind)
    return Task(name, kind, tuple(commands))


def _words(path: Path, where: str, text: Any) -> tuple[str, ...]:
    if text is None:
        return ()
    if not isinstance(text, str):
        raise UserError(f"{path}: {where}: write a text, not {text!r}")
    try:
        return tuple(shlex.split(text, comments=True))
    except ValueError as error:
        raise UserError(f"{path}: {where}: {error}") from error


def _check_names(path: Path, task: Task, known: Any) -> None:
    what = "arm" if task.kind == "arm" else "stage"
    for name in task.stages:
        if name not in known:
            raise UserError(
                f"{path}: {what} {task.name} names {{{name}}}, which no stage before it is"
            )
