"""Locate, start and record a task of an experiment, for one seed or for all of them.

    DIRECTORY/begun.json     written first: a hash of the task's commands and of its inputs; a
                             directory without it was not made by an experiment
    DIRECTORY/record.json    written last, by a rename: the same hash, so the task is complete
    DIRECTORY/log            what the task's processes print

If the hash differs, the directory is made anew.  Otherwise the commands continue with what is
there, as pretraining does from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import msgspec

from megatron_slm.analysis.experiments.recipe import PLACEHOLDER, Experiment, ExperimentTask
from megatron_slm.errors import UserError
from megatron_slm.files import leftovers, read_json, sha256_of, temporary, write_whole
from megatron_slm.parser import Parser

REPOSITORY = Path(__file__).resolve().parents[3]
PRETRAIN = "-m megatron_slm.pretrain".split()
SCORE = "-m megatron_slm.jobs.score_reference".split()
EVALUATE = "-m megatron_slm.analysis.evaluation.command".split()
LOGGED = "--tensorboard-log-interval 1 --log-timers-to-tensorboard".split()
LAST_BYTES = 1 << 16  # the end of a log, which is searched for the reason of a failure
# By the kind of a task: what it makes in its directory, and where this is, if not in stages.
MADE = {
    "pretrain": "checkpoints",
    "arm": "checkpoints",
    "score": "cache",
    "run": "",
    "evaluate": "scores.json",
}
PLACES = {"arm": "runs", "evaluate": "evaluations"}


@dataclass(frozen=True)
class Instance:
    """A task of a recipe, for one seed or shared by all of them."""

    recipe: Experiment
    """The experiment."""

    task: ExperimentTask
    """The stage or arm."""

    seed: int | None
    """The seed; None if all seeds share the task."""

    @property
    def name(self) -> str:
        """The task's name, with the seed if it has one."""
        name = self.task.name if self.seed is None else f"{self.task.name}-seed{self.seed}"
        return f"{name}-evaluation" if self.task.kind == "evaluate" else name

    @property
    def directory(self) -> Path:
        """The task's directory, relative to the study's."""
        return Path(PLACES.get(self.task.kind, "stages")) / self.name

    @property
    def output(self) -> Path:
        """What the task's name in braces stands for, relative to the study's directory."""
        return self.directory / MADE[self.task.kind]

    @cached_property
    def stages(self) -> list[Instance]:
        """The stages that the task names, for the same seed."""
        stages = (self.recipe.stages[name] for name in self.task.stages)
        return [
            Instance(self.recipe, stage, self.seed if self.recipe.per_seed(stage) else None)
            for stage in stages
        ]

    @property
    def inputs(self) -> list[Instance]:
        """What has to be there before: the stages, and the arm that is evaluated."""
        return [*self.stages, self._arm] if self.task.kind == "evaluate" else self.stages

    @property
    def _arm(self) -> Instance:
        return Instance(self.recipe, self.recipe.arms[self.task.name], self.seed)

    @cached_property
    def hash(self) -> str:
        """A hash of all that determines the task's outcome: its commands, the files of this
        repository that they name, its inputs, the seed and the number of ranks; for an evaluation,
        the tasks in its --include-path as well."""
        does: list[Any] = [self.task.kind, self.task.commands, self.seed]
        does += [one.hash for one in self.inputs]
        named = (Path(word.replace("{root}", str(REPOSITORY))) for word in self.task.words)
        own = [path for path in named if path.is_relative_to(REPOSITORY) and path.is_file()]
        does += map(sha256_of, own)
        if self.task.kind == "evaluate":
            does += _files_of_tasks(self.task.words)
        if self.task.kind != "run":
            does.append(self.recipe.ranks)
        return hashlib.sha256(json.dumps(does).encode()).hexdigest()

    def done(self, study: Path) -> bool:
        """Return whether the task is complete."""
        return _hash_in(study / self.directory / "record.json") == self.hash

    def prepare(self, study: Path) -> None:
        """Create the task's directory, unless an earlier start of the same task left one.

        Raises:
            UserError: there is a directory of that name which no experiment made.
        """
        directory = study / self.directory
        begun = _hash_in(directory / "begun.json")
        if begun == self.hash:
            return
        for leftover in leftovers(directory):  # of a start that was killed in this function
            shutil.rmtree(leftover)
        # This start may be killed too: renaming means that the directory is never incomplete.
        if begun is not None:
            old = temporary(directory)
            directory.rename(old)
            shutil.rmtree(old)
        elif directory.exists() and any(directory.iterdir()):
            raise UserError(
                f"{directory} has no begun.json, so this study did not make it; move it away"
            )
        new = temporary(directory)
        new.mkdir(parents=True)
        write_json(new / "begun.json", {"hash": self.hash})
        new.rename(directory)

    def finish(self, study: Path) -> None:
        """Record that the task is complete."""
        record = {"hash": self.hash, "commands": self.commands(study)}
        write_json(study / self.directory / "record.json", record)

    def commands(self, study: Path) -> list[list[str]]:
        """Return the commands, which are run one after the other in the study's directory."""
        known = {one.task.name: str(one.output) for one in self.stages}
        known |= {"out": str(self.output), "root": str(REPOSITORY), "seed": str(self.seed)}

        def filled(word: str) -> str:
            return PLACEHOLDER.sub(lambda found: known[found[1]], word)

        commands = [[filled(word) for word in command] for command in self.task.commands]
        if self.task.kind == "run":
            return [
                [sys.executable if words[0] == "python" else words[0], *words[1:]]
                for words in commands
            ]
        (words,) = commands
        if self.task.kind == "evaluate":
            files = ["--model", str(self._arm.output), "--output", str(self.output)]
            return [[sys.executable, *EVALUATE, *files, *words]]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        if self.task.kind == "score":
            return [[*self._launcher(), *SCORE, *words, "--slm-reference-cache", str(self.output)]]
        # A start that was killed after its last checkpoint resumes from it, whatever it lacks.
        words += [f"--no-load-{part}" for part in ("optim", "rng") if f"--no-save-{part}" in words]
        saved = str(self.output)
        words += ["--save", saved, "--load", saved]
        words += ["--tensorboard-dir", str(self.directory / "tensorboard"), *LOGGED]
        return [[*self._launcher(), *PRETRAIN, *words]]

    def _launcher(self) -> list[str]:
        if self.recipe.ranks == 1:
            return [sys.executable]
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node".split()
        return [sys.executable, *torchrun, str(self.recipe.ranks)]


def tasks_directory(words: Iterable[str]) -> Path | None:
    """Return an evaluation's --include-path, if it has one; what a stage makes is not absolute."""
    parser = Parser(add_help=False)
    parser.add_argument("--include-path")
    found = parser.parse_known_args([*words])[0].include_path
    return None if found is None else Path(found.replace("{root}", str(REPOSITORY)))


def _files_of_tasks(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the names and hashes of all files in an evaluation's --include-path; what a stage
    makes there stands for itself."""
    path = tasks_directory(words)
    if path is None or not path.is_absolute():
        return []
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".pyc")
    return [(str(file.relative_to(path)), sha256_of(file)) for file in files]


class _Hash(msgspec.Struct):
    hash: str


def _hash_in(file: Path) -> str | None:
    """Read the hash in a begun.json or record.json; None if there is no such file.

    Raises:
        UserError: the file is damaged; it is not replaced, since it could stand for hours of
            training.
    """
    if not file.exists():
        return None
    try:
        return read_json(file, _Hash, 1 << 24).hash
    except UserError as error:
        raise UserError(f"{error}; move {file.parent} away to have it made anew") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_whole(path, json.dumps(content, indent=1).encode())


class Running:
    """A running task: its commands one after the other, each in a process that dies with this one.

    Args:
        instance: the task.
        study: directory of the experiment.
        threads: number of threads of each rank.
        lock: an open file whose lock the processes share, so that it is held until the last one
            ends.
    """

    def __init__(self, instance: Instance, study: Path, threads: int, lock: IO[str]) -> None:
        self.instance = instance
        self.study = study
        self.threads = threads
        self.log = study / instance.directory / "log"
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }
        if instance.task.kind not in ("run", "evaluate"):
            self.environment |= _one_rank()
        self.lock = lock
        self.left = instance.commands(study)
        self.process: subprocess.Popen[bytes] | None = None

    def poll(self) -> int | None:
        """Start the next command if the last one has ended.

        Returns:
            The exit code of the first command that failed, 0 if all have succeeded, and None until
            then.

        Raises:
            UserError: a command cannot be started.
        """
        if self.process is not None:
            code = self.process.poll()
            if code is None or code != 0:
                return code
        if not self.left:
            return 0
        with self.log.open("ab") as log:
            self._start(self.left.pop(0), log)
        return None

    def _start(self, command: list[str], log: IO[bytes]) -> None:
        try:
            self.process = subprocess.Popen(
                command,
                cwd=self.study,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self.lock.fileno()],
                preexec_fn=_die_with_parent,  # noqa: PLW1509
            )
        except OSError as error:
            raise UserError(f"{self.instance.name}: {error}") from error

    def stop(self) -> None:
        """End the task; what it has made stays for the next start."""
        self.left = []
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def last_words(self) -> str:
        """Return the line of the log that says most about a failure."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if "error:" in line.lower()]
        return (errors or lines or ["it printed nothing"])[-1]


def _die_with_parent() -> None:
    """Have this child process get SIGTERM when its parent ends, by prctl's PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _one_rank() -> dict[str, str]:
    """Return the variables that torchrun would set for one rank; torchrun overrides them."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
