"""Tell how far an experiment is and how long the rest will take, from the logs of its tasks.

Megatron logs how long its steps and validations take.  A step that has not run yet is expected to
take as long as steps with the same number of threads did.  Before there are any such steps, the
estimate assumes that half of any difference in threads helps.  A step in which a reference scores
tokens costs one forward pass more.  Nothing is estimated until a task has trained.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from megatron_slm.analysis.experiments.tasks import Instance, Running

LOOK, TELL = 1.0, 60.0  # seconds between looks at the logs, and between lines without a terminal
LOGGED_STEP = re.compile(rb"\] iteration +(\d+)/ *\d+ \|.* per iteration \(ms\): ([\d.]+)")
VALIDATING = re.compile(rb"Evaluating iter (\d+)/(\d+)")
VALIDATED = re.compile(rb" evaluate \.+: \([\d.]+, ([\d.]+)\)")
VALID_SAMPLES = re.compile(rb"GPTDataset valid indices\n.*total number of samples: (\d+)")
SCORED = re.compile(rb"(\d+)%\|")  # tqdm's progress bar
# The assumed cost of a validation iteration, in training steps, until one has run.  A full
# validation has one sample per iteration.
FULL_VALIDATION, VALIDATION = 1 / 12, 1 / 3


class Watched:
    """What the log of a running task has said since this command started it.

    None stands for what it has not said yet.
    """

    def __init__(self, one: Running, options: Namespace) -> None:
        self.one, self.options = one, options
        self.began = time.monotonic()
        self.start: float | None = None  # seconds until the first step had run
        self.first = self.step = 0  # the first step that this command ran, and the latest
        self.step_seconds: float | None = None
        self.validations = self.iteration = 0  # those completed; the iteration of one in progress
        self.each: int | None = None  # iterations per validation
        self.validation_seconds: float | None = None  # per iteration
        self.scored = 0  # percent
        self.read = self.size  # bytes; skips what an earlier start logged

    @property
    def size(self) -> int:
        """The size of the log in bytes."""
        return self.one.log.stat().st_size if self.one.log.exists() else 0

    def look(self) -> None:
        """Read what was logged since the last look."""
        if self.size == self.read:
            return
        with self.one.log.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        new = new[: max(new.rfind(b"\n"), new.rfind(b"\r")) + 1]
        self.read += len(new)
        for found in LOGGED_STEP.finditer(new):
            step, seconds = int(found[1]), float(found[2]) / 1000
            if self.start is None:  # the first step is slower than others, so it does not count
                self.start, self.first = time.monotonic() - self.began, step
            else:  # other load on the machine comes and goes, so recent steps count most
                before = self.step_seconds
                self.step_seconds = seconds if before is None else (before + seconds) / 2
            self.step = step
        if samples := VALID_SAMPLES.search(new):
            self.each = int(samples[1]) if self.options.full_validation else None
        for found in VALIDATING.finditer(new):
            self.iteration, self.each = int(found[1]), int(found[2])
        for found in VALIDATED.finditer(new):
            self.validations += 1
            self.iteration = 0
            if self.each:
                self.validation_seconds = float(found[1]) / 1000 / self.each
        if self.kind == "score":
            self.scored = int((SCORED.findall(new) or [self.scored])[-1])

    @property
    def kind(self) -> str:
        """What the task runs (ExperimentTask)."""
        return self.one.instance.task.kind

    def told(self) -> str:
        """Return how far the task is, in words."""
        kind, name = self.kind, self.one.instance.name
        if kind in ("run", "evaluate"):
            count = len(self.one.instance.task.commands)
            return f"{name} {count - len(self.one.left)} of {count}" if count > 1 else name
        if kind == "score":
            return f"{name} {self.scored}%"
        if self.iteration:
            return f"{name} validates, step {self.step} of {self.options.train_iters}"
        return f"{name} step {self.step} of {self.options.train_iters}"


class StudyProgress:
    """A line on stderr that says what is running, how far it is, and how long the rest will take.

    Args:
        todo: all tasks that are not complete.
        count: number of all tasks.
        study: directory of the experiment.
        jobs: number of tasks that run at a time, once the stages that seeds share are complete.
    """

    def __init__(self, todo: Sequence[Instance], count: int, study: Path, jobs: int) -> None:
        self.todo, self.count, self.study, self.jobs = list(todo), count, study, jobs
        self.began = time.monotonic()
        self.watched: dict[str, Watched] = {}
        # Seconds of each task that trains nothing, by kind.
        self.spent: dict[str, list[float]] = {"run": [], "evaluate": []}
        self.terminal = sys.stderr.isatty()
        self.looked = self.shown = -TELL
        self.names: list[str] = []

    def show(self, running: Sequence[Running]) -> None:
        """Look at the logs and write the line, if it is time to."""
        now, names = time.monotonic(), [one.instance.name for one in running]
        changed = names != self.names
        if not changed and now - self.looked < LOOK:
            return
        self.looked, self.names = now, names
        for one in running:
            if one.instance.name not in self.watched:
                self.watched[one.instance.name] = Watched(one, _options(one.instance, self.study))
            self.watched[one.instance.name].look()
        if self.terminal or changed or now - self.shown >= TELL:
            self.shown = now
            self._write([self.watched[name] for name in names])

    def ended(self, one: Running, whole: bool) -> None:
        """Take note of a task that has ended, and whether it is complete."""
        if whole:
            self.todo.remove(one.instance)
        if (watched := self.watched.get(one.instance.name)) and watched.kind in self.spent:
            self.spent[watched.kind].append(time.monotonic() - watched.began)

    def end(self) -> None:
        """Erase the line from the terminal."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _write(self, running: list[Watched]) -> None:
        left = self.left(running)
        line = (
            f"{self.count - len(self.todo)} of {self.count} done, "
            f"{in_words(time.monotonic() - self.began)} gone, "
            f"{'time left not known yet' if left is None else f'about {in_words(left)} left'}: "
            f"{', '.join(each.told() for each in running)}"
        )
        if self.terminal:
            line = f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def left(self, running: list[Watched]) -> float | None:
        """Return the seconds until everything is complete; None until a task has trained."""
        if all(each.step_seconds is None for each in self.watched.values()):
            return None
        names = [each.one.instance.name for each in running]
        waiting = [one for one in self.todo if one.name not in names]
        shared, own = (
            _end(
                [self._rest(one) for one in running if (one.one.instance.seed is None) == shared],
                [self._whole(one, jobs) for one in waiting if (one.seed is None) == shared],
                jobs,
            )
            for shared, jobs in ((True, 1), (False, self.jobs))
        )
        return shared + own

    def _whole(self, instance: Instance, jobs: int) -> float:
        """Estimate how many seconds a task that has not started will take."""
        if (spent := self.spent.get(instance.task.kind)) is not None:
            return mean(spent) if spent else 0.0
        options, threads = _options(instance, self.study), threads_of(instance, jobs)
        start = mean(each.start for each in self.watched.values() if each.start is not None)
        step = self._step(options, threads)
        if instance.task.kind == "score":
            return start + options.train_iters * step / _passes(options)
        count = options.train_iters // options.eval_interval if options.eval_interval else 0
        return start + options.train_iters * step + count * self._validation(options, threads, step)

    def _rest(self, watched: Watched) -> float:
        """Estimate how many seconds a running task will still take."""
        instance, options, threads = watched.one.instance, watched.options, watched.one.threads
        gone = time.monotonic() - watched.began
        if watched.scored:
            return gone * (100 - watched.scored) / watched.scored
        if watched.start is None:
            return max(0.0, self._whole(instance, 1 if instance.seed is None else self.jobs) - gone)
        step = watched.step_seconds or self._step(options, threads)
        rest = (options.train_iters - watched.step) * step
        if options.eval_interval:
            before = (watched.first - 1) // options.eval_interval  # in an earlier start
            count = options.train_iters // options.eval_interval - before - watched.validations
            part = watched.iteration / watched.each if watched.each else 0.0
            rest += max(0.0, count - part) * self._validation(options, threads, step, watched)
        return rest

    def _step(self, options: Namespace, threads: int) -> float:
        """Estimate the seconds of a step from steps with as many threads, or else from others."""
        passes = self._known(lambda each: each.step_seconds, threads, _by_passes)
        assert passes is not None  # left() has checked
        return passes * _passes(options)

    def _validation(
        self, options: Namespace, threads: int, step: float, own: Watched | None = None
    ) -> float:
        """Estimate the seconds of a validation."""
        counts = [each.each for each in self.watched.values() if each.each]
        count = (own.each if own else None) or (counts[-1] if counts else options.eval_iters)
        each = own.validation_seconds if own else None
        each = each or self._known(lambda other: other.validation_seconds, threads)
        if each is None:
            each = step * (FULL_VALIDATION if options.full_validation else VALIDATION)
        return count * each

    def _known(
        self,
        seconds: Callable[[Watched], float | None],
        threads: int,
        share: Callable[[Watched], float] = lambda _: 1.0,
    ) -> float | None:
        """Return the mean of what was measured with as many threads.

        If nothing was, scale what was measured with other numbers of threads, assuming that half of
        the difference helps; None if nothing was measured at all.
        """
        known = [
            (each.one.threads, found * share(each))
            for each in self.watched.values()
            if (found := seconds(each)) is not None
        ]
        same = [found for count, found in known if count == threads]
        best = same or [found * (1 + count / threads) / 2 for count, found in known]
        return mean(best) if best else None


def _end(busy: list[float], then: list[float], jobs: int) -> float:
    """Return after how many seconds the last task ends, if each starts as soon as a place is free.

    Args:
        busy: seconds left of the tasks that are running.
        then: seconds of each task that waits, in order.
        jobs: number of places.
    """
    ends = busy + [0.0] * max(0, jobs - len(busy))
    heapq.heapify(ends)
    for seconds in then:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def threads_of(instance: Instance, jobs: int) -> int:
    """Return how many threads each rank of a task gets if `jobs` tasks share the cores."""
    return max(1, len(os.sched_getaffinity(0)) // (jobs * instance.recipe.ranks))


def _options(instance: Instance, study: Path) -> Namespace:
    """Parse the arguments of a task that determine how long it takes."""
    parser = ArgumentParser(allow_abbrev=False)
    for name in ("--train-iters", "--eval-interval", "--eval-iters"):
        parser.add_argument(name, type=_number, default=0)
    parser.add_argument("--full-validation", action="store_true")
    parser.add_argument("--slm-reference-load", nargs="+", default=[])
    return parser.parse_known_args(instance.commands(study)[0])[0]


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0  # the task itself will refuse what is no number


def _passes(options: Namespace) -> int:
    """Return the cost of a step in forward passes: three, and one for each reference."""
    return 3 + len(options.slm_reference_load)


def _by_passes(watched: Watched) -> float:
    return 1 / _passes(watched.options)


def in_words(seconds: float) -> str:
    """Format a time in its two largest units, such as "1 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
