"""The time that an experiment says is left, from logs as Megatron writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import REPOSITORY
from megatron_slm.analysis.experiments.experiment import tasks_of
from megatron_slm.analysis.experiments.progress import StudyProgress, in_words
from megatron_slm.analysis.experiments.recipe import read_experiment
from megatron_slm.analysis.experiments.tasks import Running

QUICK = REPOSITORY / "examples/experiments/quick.yaml"


def step(number: int, milliseconds: float) -> str:
    return (
        f" [2026-01-01 00:00:00.000000] iteration {number:8}/      60 | consumed samples:      "
        f"     80 | elapsed time per iteration (ms): {milliseconds:.1f} | learning rate: 1E-03 |\n"
    )


def validation(milliseconds: float) -> str:
    lines = "".join(f"Evaluating iter {number}/250\n" for number in range(1, 251))
    return (
        f"{lines}INFO:megatron.core.timers:(min, max) time across ranks (ms):\n"
        f"    evaluate .......................................: ({milliseconds}, {milliseconds})\n"
    )


def test_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages count: what runs by its own pace, the others by its, two of them at a time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    tasks = {one.name: one for one in tasks_of(read_experiment(QUICK), None, None)}
    todo = [one for name, one in tasks.items() if name not in ("corpora", "tokenizer", "datasets")]
    progress = StudyProgress(todo, len(tasks), tmp_path, jobs=2)
    with (tmp_path / "lock").open("w") as lock:
        reference = Running(tasks["reference"], tmp_path, 2, lock)
        reference.log.parent.mkdir(parents=True)

        def look(log: str, *running: Running) -> float | None:
            with running[0].log.open("a") as file:
                file.write(log)
            progress.looked = 0.0
            progress.show(running)
            return progress.left([progress.watched[one.instance.name] for one in running])

        began = (
            "INFO:megatron.core.datasets.gpt_dataset:Build and save the GPTDataset valid indices\n"
            "INFO:megatron.core.datasets.gpt_dataset:> total number of samples: 250\n"
        )
        assert look("", reference) is None
        assert look(began + step(1, 9000.0), reference) is None
        # 50 steps of 0.4 s and a validation, whose iterations are taken for a twelfth of a step.
        rest = 50 * 0.4 + 250 * 0.4 / 12
        # With one thread for two CLM and random take half more, 0.6 s for a step, SLM a third more
        # than they, and all validate six times; random begins when CLM ends.
        clm = 60 * 0.6 + 6 * 250 * 0.6 / 12
        assert look(step(5, 400.0) + step(10, 400.0), reference) == pytest.approx(
            rest + 2 * clm, abs=1
        )
        # A validation has been measured: 0.01 s an iteration, half more with one thread.
        text = step(60, 400.0) + validation(2500.0)
        clm = 60 * 0.6 + 6 * 250 * 0.015
        assert look(text, reference) == pytest.approx(2 * clm, abs=1)
        progress.ended(reference, whole=True)
        clm_run, slm_run = (
            Running(tasks[f"{arm}-seed1"], tmp_path, 1, lock) for arm in ("clm", "slm")
        )
        for one in (clm_run, slm_run):
            one.log.parent.mkdir(parents=True)
        look("", clm_run, slm_run)
        look(step(1, 1000.0) + step(30, 500.0), clm_run, slm_run)
        left = look(step(1, 1000.0) + step(30, 900.0), slm_run, clm_run)
        # By its own pace: 30 steps, and all validations, of which its log tells none yet.
        slm = 30 * 0.9 + 6 * 250 * 0.015
        clm = 30 * 0.5 + 6 * 250 * 0.015
        random = 60 * (0.5 / 3 + 0.9 / 4) / 2 * 3 + 6 * 250 * 0.015
        assert left == pytest.approx(max(clm + random, slm), abs=1)
        progress.looked = 0.0
        assert "slm-seed1 step 30 of 60" in progress.watched["slm-seed1"].told()


def test_times_in_words() -> None:
    told = [in_words(seconds) for seconds in (0.4, 59.6, 61, 3599.7, 3661, 90000)]
    assert told == ["0 s", "1 min 0 s", "1 min 1 s", "1 h 0 min", "1 h 1 min", "25 h 0 min"]
