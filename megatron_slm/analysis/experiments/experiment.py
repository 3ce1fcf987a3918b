"""Run an experiment: stages first, then every arm from the same start, on the same data in order.

    1. The stages that all seeds share run one after the other, each with all cores.
    2. The stages, arms and evaluations of each seed run `jobs` at a time, each with its part of the
       cores.

Tasks that are complete are not run again (tasks.py).  Only one command at a time works in a study's
directory.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from megatron_slm.analysis.experiments.evaluations import check_evaluation, read_scores
from megatron_slm.analysis.experiments.progress import StudyProgress, threads_of
from megatron_slm.analysis.experiments.recipe import (
    BASELINE,
    Experiment,
    ExperimentTask,
    read_experiment,
)
from megatron_slm.analysis.experiments.results import Runs, cut, summary
from megatron_slm.analysis.experiments.scale import scaled
from megatron_slm.analysis.experiments.study_file import STUDY_FORMAT
from megatron_slm.analysis.experiments.table import markdown, results_table
from megatron_slm.analysis.experiments.tasks import Instance, Running, write_json
from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

TASK_POLL_SECONDS = 0.1


def run_experiment(
    path: Path,
    study: Path,
    jobs: int,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    scale: float = 1.0,
) -> str:
    """Run the experiment of a recipe, and write results.json and results.md.

    Args:
        path: the recipe.
        study: directory for everything that the experiment makes.
        jobs: number of tasks that run at a time.
        arms: names of the recipe's arms to run, or None for all; the baseline always runs.
        seeds: the recipe's seeds to run, or None for all.
        scale: factor for the numbers of iterations and tokens of all runs.

    Returns:
        A table of the results, including those that earlier commands made in this directory.

    Raises:
        UserError: the recipe is faulty, or does not have such an arm or seed; lm-eval is needed and
            not installed, or lacks a task; or a task failed. A failure is raised, with the path of
            its log, only after every task that does not depend on it has run and the results are
            written.
    """
    recipe = scaled(read_experiment(path), scale)
    study = study.resolve()
    instances = tasks_of(recipe, arms, seeds)
    if any(one.task.kind == "evaluate" and not one.done(study) for one in instances):
        check_evaluation(recipe)
    try:
        study.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {study}: {error.strerror}") from error
    with _lock(study) as lock:
        failed = _run(instances, study, jobs, lock)
        found = _write_results(recipe, study, failed)
    if failed:
        print(results_table(found))
        raise UserError("; ".join(failed))
    return results_table(found)


def _write_results(recipe: Experiment, study: Path, failed: list[str]) -> dict[str, Any]:
    """Write the results of all arms that are complete, and return their summary.

    Raises:
        UserError: not even the baseline is complete; the message is `failed`.
    """
    done = [
        one for one in tasks_of(recipe, None, None) if one.task.kind == "arm" and one.done(study)
    ]
    if failed and not any(one.task.name == BASELINE for one in done):
        raise UserError("; ".join(failed))
    # This imports Megatron, which takes seconds; an error in the recipe should show before that.
    from megatron_slm.analysis.experiments.runs import measure_run

    runs: Runs = {one.task.name: {} for one in done}
    for one in done:
        assert one.seed is not None
        scores = read_scores(one, study)
        runs[one.task.name][one.seed] = replace(measure_run(one, study), scores=scores)
    found = summary(runs)
    results = {
        "format": STUDY_FORMAT,
        "study": recipe.name,
        "target": recipe.target,
        "tokens_per_step": found["compared"]["tokens"] // found["compared"]["iteration"],
        "arms": {
            arm: {
                "arguments": recipe.arms[arm].commands[0],
                "description": recipe.arms[arm].description,
                "seeds": {
                    seed: cut(result, found["compared"]["iteration"]).described()
                    | {"curve": result.curve}
                    for seed, result in results.items()
                },
            }
            for arm, results in runs.items()
        },
        "summary": found,
    }
    write_json(study / "results.json", results)
    write_whole(study / "results.md", markdown(recipe.name, recipe.target, found).encode())
    return found


def _run(instances: list[Instance], study: Path, jobs: int, lock: IO[str]) -> list[str]:
    """Run the tasks that are not complete, and return what failed and why."""
    todo = [one for one in instances if not one.done(study)]
    once = [one for one in todo if one.seed is None]
    progress = StudyProgress(todo, len(instances), study, jobs)
    try:
        failed = _work(once, study, 1, lock, progress)
        return failed + _work(todo[len(once) :], study, jobs, lock, progress)
    finally:
        progress.end()


def tasks_of(
    recipe: Experiment, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Instance]:
    """Return all tasks in an order in which they can run, starting with those that seeds share.

    Args:
        recipe: the experiment.
        arms: names of the arms wanted, or None for all; the baseline is always among them.
        seeds: the seeds wanted, or None for all.

    Raises:
        UserError: the recipe does not have such an arm or seed.
    """
    for name in arms or ():
        if name not in recipe.arms:
            raise UserError(f"--arms {name}: the recipe has {', '.join(recipe.arms)}")
    for seed in seeds or ():
        if seed not in recipe.seeds:
            raise UserError(f"--seeds {seed}: the recipe has {', '.join(map(str, recipe.seeds))}")
    wanted = [
        arm for name, arm in recipe.arms.items() if name in (BASELINE, *(arms or recipe.arms))
    ]
    by_seed = {
        seed: [arm for arm in wanted if seed in arm.seeds] for seed in (seeds or recipe.seeds)
    }
    run = [arm for arm in wanted if any(arm in own for own in by_seed.values())]
    once = [stage for stage in _stages(recipe, run) if not recipe.per_seed(stage)]
    return [Instance(recipe, stage, None) for stage in once] + [
        Instance(recipe, task, seed)
        for seed, own in by_seed.items()
        for task in (*_stages(recipe, own), *own, *recipe.evaluations(own))
        if recipe.per_seed(task)
    ]


def _stages(recipe: Experiment, arms: Sequence[ExperimentTask]) -> list[ExperimentTask]:
    """Return the stages that some arms and their evaluations depend on, in order."""
    tasks = (*arms, *recipe.evaluations(arms))
    needed = {name for task in tasks for name in recipe.needs(task)}
    return [stage for name, stage in recipe.stages.items() if name in needed]


@contextmanager
def _lock(study: Path) -> Iterator[IO[str]]:
    """Keep other commands out of a study's directory.

    The processes that a killed command leaves behind hold the lock until they have ended.
    """
    with (study / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"> {study} is in use by another command: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _work(
    todo: list[Instance], study: Path, jobs: int, lock: IO[str], progress: StudyProgress
) -> list[str]:
    """Run tasks, at most `jobs` at a time, each as soon as its inputs are complete.

    When a task fails, those that depend on it are skipped and all others go on.

    Returns:
        For each failure, what failed and why.
    """
    waiting, running, failed = list(todo), list[Running](), list[str]()
    try:
        while True:
            ready = [one for one in waiting if all(need.done(study) for need in one.inputs)]
            for instance in ready[: jobs - len(running)]:
                waiting.remove(instance)
                instance.prepare(study)
                running.append(Running(instance, study, threads_of(instance, jobs), lock))
            if not running:
                return failed
            progress.show(running)
            for one in list(running):
                code = one.poll()
                if code is None:
                    continue
                running.remove(one)
                progress.ended(one, whole=code == 0)
                if code == 0:
                    one.instance.finish(study)
                else:
                    why = f"{one.instance.name} failed with exit code {code}: {one.last_words()}"
                    failed.append(f"{why} (its log: {one.log})")
            time.sleep(TASK_POLL_SECONDS)
    finally:
        for one in running:
            one.stop()
