"""Experiments: what recipes are refused, how results are computed, and a study that was killed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import LLAMA, Corpus
from launch import REPOSITORY
from megatron_slm.analysis.evaluation.benchmarks import Benchmark
from megatron_slm.analysis.evaluation.command import build_parser
from megatron_slm.analysis.evaluation.evaluate import BenchmarkScore
from megatron_slm.analysis.evaluation.scores import write_scores
from megatron_slm.analysis.experiments import evaluations
from megatron_slm.analysis.experiments.evaluations import read_scores
from megatron_slm.analysis.experiments.experiment import run_experiment, tasks_of
from megatron_slm.analysis.experiments.recipe import read_experiment
from megatron_slm.analysis.experiments.results import (
    Point,
    RunResult,
    at_compute,
    compared_at,
    cut,
    summary,
    tokens_to_reach,
)
from megatron_slm.analysis.experiments.scale import scaled
from megatron_slm.analysis.experiments.table import markdown, results_table
from megatron_slm.analysis.experiments.tasks import Instance
from megatron_slm.analysis.report.picture import write_picture
from megatron_slm.entry import add_arguments
from megatron_slm.errors import UserError
from megatron_slm.files import temporary
from megatron_slm.training.command_line.first_check import SCORING
from pictures import read_picture

SMALLEST = """
seeds: [1]
arms: {clm: {}}
"""


def write(directory: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {clm: {}}", "a recipe needs seeds, a list of whole numbers"),
        ("seeds: [one]\narms: {clm: {}}", "Expected `int`, got `str` - at `$.seeds[0]`"),
        ("seeds: [1]\narms: {slm: {}}", "no arm is named clm"),
        (SMALLEST + "stage: {}", "unknown field `stage`"),
        (SMALLEST + "ranks: 0", "Expected `int` >= 1 - at `$.ranks`"),
        (
            SMALLEST + "stages: {data: {make: x}}",
            "`make`; known: run, pretrain, score",
        ),
        (SMALLEST + "stages: {data: {run: []}}", "stage data has nothing to run"),
        (SMALLEST + "stages: {seed: {run: x}}", "'seed' cannot be a name in stages"),
        (SMALLEST + "arguments: --load {base}", "arm clm names {base}, which no stage before it"),
        (SMALLEST + "stages: {a: {run: 'x {b}'}, b: {run: x}}", "stage a names {b}"),
        (SMALLEST + 'arguments: "--load \'x"', "arguments: No closing quotation"),
        (
            "seeds: [1]\narms: {clm: --lr 1}",
            "arm clm: Expected `object`, got `str`; known: desc",
        ),
        ("seeds: [1]\narms: {clm: {}, slm: {seeds: [2]}}", "arm slm: seed 2 is not among"),
        ("seeds: [1, 2]\narms: {clm: {seeds: [1]}}", "arm clm has to run with every seed"),
        (SMALLEST + "evaluate: --tasks {tasks}", "evaluate names {tasks}, which no stage before"),
        ("extends: recipe.yaml", "it extends itself"),
        ("extends: none.yaml", "none.yaml"),
        ("[1]", "Expected `object`, got `array`"),
        ("a: [", "recipe.yaml"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_experiment(write(tmp_path, text))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_recipes_extend_others(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
        seeds: [1, 2]
        arguments: --lr 1
        training: --train-iters 2
        stages: {data: {run: make data}, base: {pretrain: "{data}"}, scores: {score: "{base}"}}
        arms: {clm: {arguments: "{data}"}, slm: {arguments: "{scores}"}, other: {}}
        """,
        "parent.yaml",
    )
    own = (
        "extends: parent.yaml\narguments: --lr 2\narms: {other: null, half: {arguments: '{base}'}}"
    )
    recipe = read_experiment(write(tmp_path, own))
    assert list(recipe.arms) == ["clm", "slm", "half"]
    assert recipe.stages["base"].commands == (("--lr", "1", "--lr", "2", "{data}"),)
    assert recipe.arms["half"].commands == (
        ("--lr", "1", "--lr", "2", "--train-iters", "2", "{base}"),
    )
    # What all seeds share comes first, and only what is needed; scores are of a seed's own order.
    names = [one.name for one in tasks_of(recipe, ["slm"], [2])]
    assert names == ["data", "base", "scores-seed2", "clm-seed2", "slm-seed2"]
    names = [one.name for one in tasks_of(recipe, ["half"], None)]
    assert names == ["data", "base", "clm-seed1", "half-seed1", "clm-seed2", "half-seed2"]
    with pytest.raises(UserError, match="--arms none: the recipe has clm, slm, half"):
        tasks_of(recipe, ["none"], None)
    with pytest.raises(UserError, match="--seeds 3: the recipe has 1, 2"):
        tasks_of(recipe, None, [3])


def test_arms_with_some_seeds(tmp_path: Path) -> None:
    """Nothing is made for a seed that no arm needs it for."""
    text = """
        seeds: [1, 2]
        training: --train-iters 8
        stages: {base: {run: make it}, scores: {score: "--load {base}"}}
        arms: {clm: {}, slm: {arguments: "{scores}", seeds: [2]}}
        """
    recipe = read_experiment(write(tmp_path, text))
    names = [one.name for one in tasks_of(recipe, None, None)]
    assert names == ["base", "clm-seed1", "scores-seed2", "clm-seed2", "slm-seed2"]
    assert [one.name for one in tasks_of(recipe, None, [1])] == ["clm-seed1"]


def test_arms_are_evaluated_if_the_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        seeds: [1, 2]
        stages: {data: {run: make it}, tasks: {run: "write {out} {data}"}, slm: {run: make slm}}
        arms: {clm: {}, slm: {arguments: "--load {slm}", seeds: [2]}}
        """
    write(tmp_path, text)
    recipe = read_experiment(
        write(tmp_path, "extends: recipe.yaml\nevaluate: --like {slm} {tasks}", "more.yaml")
    )
    found = tasks_of(recipe, ["slm"], [2])
    assert [one.name for one in found] == [
        *("data", "tasks", "slm", "clm-seed2", "slm-seed2"),
        *("clm-seed2-evaluation", "slm-seed2-evaluation"),
    ]
    evaluated = found[-1]
    assert [one.name for one in evaluated.inputs] == ["slm", "tasks", "slm-seed2"]
    ((_, *words),) = evaluated.commands(tmp_path)
    assert words[2:] == [
        *("--model", "runs/slm-seed2/checkpoints"),
        *("--output", "evaluations/slm-seed2-evaluation/scores.json"),
        *("--like", "stages/slm", "stages/tasks"),
    ]
    plain = tasks_of(read_experiment(tmp_path / "recipe.yaml"), ["slm"], [2])
    assert [one.hash for one in plain] == [found[at].hash for at in (2, 3, 4)]
    monkeypatch.setattr(evaluations, "find_spec", lambda name: True)
    for arguments, message in (
        ("--tasks sums --model {slm}", "more: evaluate: the study itself gives --model; leave it"),
        (
            "--tasks sums --output=a",
            "more: evaluate: the study itself gives --output; leave it out",
        ),
        ("--like {slm}", "more: evaluate: the following arguments are required: --tasks"),
        ("--task sums", "more: evaluate: "),
        ("--tasks sums --include-path {root}/no", "evaluate: --include-path .*/no: no such direct"),
    ):
        more = write(tmp_path, f"extends: recipe.yaml\nevaluate: {arguments}", "more.yaml")
        with pytest.raises(UserError, match=message):
            run_experiment(more, tmp_path / "study", 1, None, None)
    monkeypatch.setattr(evaluations, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"more evaluates its arms with lm-eval, which is not inst"):
        run_experiment(tmp_path / "more.yaml", tmp_path / "study", 1, None, None)
    assert not (tmp_path / "study").exists()


def test_a_last_checkpoint_without_optimizer_is_resumed_from(tmp_path: Path) -> None:
    path = write(tmp_path, "seeds: [1]\narguments: --no-save-optim\narms: {clm: {}}")
    (arm,) = tasks_of(read_experiment(path), None, None)
    ((*words,),) = arm.commands(tmp_path)
    assert "--no-load-optim" in words and "--no-load-rng" not in words


def test_an_evaluation_is_of_its_tasks_as_they_are(tmp_path: Path) -> None:
    """A question that changes makes another evaluation, what Python compiles there does not; and
    scores are told apart by lm-eval's filters, except those that are not finite."""
    tasks = tmp_path / "tasks"
    (tasks / "data").mkdir(parents=True)
    (tasks / "data" / "questions.jsonl").write_text("1 + 1 =")
    recipe = f"{SMALLEST}evaluate: --tasks sums --include-path {tasks}"
    path = write(tmp_path, recipe)

    def evaluated() -> Instance:
        return tasks_of(read_experiment(path), None, None)[-1]

    arm = tasks_of(read_experiment(path), None, None)[0]
    evaluated().prepare(tmp_path)
    evaluated().finish(tmp_path)
    scores = [("sums", "exact_match,strict-match", 0.25), ("sums", "exact_match,flexible", 0.5)]
    scores += [("sums", "acc,none", 1.0), ("sums", "perplexity,none", math.nan)]
    written = [BenchmarkScore(Benchmark("sums"), task, 0, 1, *one, None) for task, *one in scores]
    write_scores(tmp_path / evaluated().output, Path("model"), written)
    (tasks / "utils.pyc").write_bytes(b"1")
    assert read_scores(arm, tmp_path) == {
        "sums exact_match,strict-match": 0.25,
        "sums exact_match,flexible": 0.5,
        "sums acc": 1.0,
    }
    (tmp_path / evaluated().output).unlink()
    with pytest.raises(UserError, match=r"; remove .*/clm-seed1-evaluation to have it evaluated a"):
        read_scores(arm, tmp_path)
    (tasks / "data" / "questions.jsonl").write_text("1 + 2 =")
    assert not evaluated().done(tmp_path)
    assert read_scores(arm, tmp_path) == {}


def test_scale(tmp_path: Path) -> None:
    text = """
        seeds: [1]
        arguments: --train-iters 20 --eval-interval 10 --lr 20 --lr-warmup-iters 5
        stages: {data: {run: make --train-iters 3}, base: {pretrain: "{data}"}}
        arms:
          clm: {arguments: "{base} --slm-warmup-tokens 512 --train-iters 40"}
          steps: {arguments: "--slm-ratio-steps 4:0.6 8:1 --lr=4 --save-interval=8"}
        """
    path = write(tmp_path, text)
    whole = read_experiment(path)
    half = scaled(whole, 0.5)
    assert scaled(whole, 1.0) == whole
    assert half.stages["data"] == whole.stages["data"]
    common = "--train-iters 10 --eval-interval 5 --lr 20 --lr-warmup-iters 5"
    assert " ".join(half.stages["base"].words) == f"{common} {{data}}"
    own = "{base} --slm-warmup-tokens 256 --train-iters 20"
    assert " ".join(half.arms["clm"].words) == f"{common} {own}"
    assert " ".join(half.arms["steps"].words).endswith(
        "--slm-ratio-steps 2:0.6 4:1 --lr=4 --save-interval=4"
    )
    (longer,) = scaled(whole, 40).arms["clm"].commands
    assert longer[-1] == "1600" and longer[1] == "800"
    with pytest.raises(UserError, match=r"--eval-interval 10 of base would be 2\.5"):
        scaled(whole, 0.25)
    done = run(path, tmp_path / "study", "--scale", "0")
    assert done.returncode == 2 and "0 is not a number above 0" in done.stderr


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples/experiments").glob("*.yaml")))
def test_recipes_of_the_repository(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron and we have the arguments of all their runs, scores and evaluations."""
    from megatron.training.arguments import parse_args

    if path.name == "small.yaml":  # which others extend
        return
    for one in tasks_of(read_experiment(path), None, None):
        if one.task.kind == "run" or one.seed not in (None, 1):
            continue
        (words,) = one.commands(Path())
        words = words[next(at for at, word in enumerate(words) if "megatron_slm." in word) :]
        monkeypatch.setattr(sys, "argv", words)
        if one.task.kind == "evaluate":
            assert build_parser().parse_args(words[1:]).tasks, one.name
            continue
        own = partial(add_arguments, job=SCORING) if one.task.kind == "score" else add_arguments
        assert parse_args(own).train_iters > 0, one.name


CURVE = ((10, 100, 5.0), (20, 200, 4.0), (30, 300, 3.5))


def result(
    curve: Any, reference: int = 0, each: int = 6, scoring: int = 0, first_loss: float = 6.0
) -> RunResult:
    """Make a run of 10 tokens a step that takes `each` FLOPs a token and trains on half of them."""
    points = (
        Point(at, tokens, loss, tokens // 2, each * tokens, scoring * tokens)
        for at, tokens, loss in curve
    )
    return RunResult("", tuple(points), reference, 1.0, first_loss)


@pytest.mark.parametrize(
    ("loss", "tokens"), [(5.5, 100), (5.0, 100), (4.5, 150), (4.0, 200), (3.5, 300), (3.4, None)]
)
def test_tokens_to_reach(loss: float, tokens: float | None) -> None:
    assert tokens_to_reach(result(CURVE).curve, loss) == tokens


def test_tokens_to_reach_takes_the_first_time() -> None:
    curve = result(((1, 10, 5.0), (2, 20, 3.0), (3, 30, 6.0), (4, 40, 2.0))).curve
    assert tokens_to_reach(curve, 4.0) == 15


@pytest.mark.parametrize(
    ("tokens", "loss"), [(99, None), (100, 5.0), (175, 4.25), (250, 3.75), (300, 3.5), (301, None)]
)
def test_comparison_at_equal_compute(tokens: int, loss: float | None) -> None:
    run = result(CURVE, reference=600, each=4, scoring=2)  # 600 before, then 6 FLOPs a token
    assert at_compute(run, 600 + 6 * tokens) == loss
    assert at_compute(run, 600) is None  # nothing left to train with


def test_costs_need_not_be_even() -> None:
    """A warm-up takes less than what follows."""
    points = (Point(10, 100, 5.0, 100, 100, 0), Point(20, 200, 4.0, 110, 200, 300))
    run = RunResult("", points, 0, 1.0, None)
    assert at_compute(run, 200) == 4.75
    until = cut(run, 10)
    assert until.described()["flops"] == {"policy": 100, "reference_training": 0, "scoring": 0}
    assert until.described()["tokens_selected"] == 100


def test_summary_of_seeds() -> None:
    longer = (*CURVE, (40, 400, 3.25))  # the baseline goes on, for the comparison at equal compute
    lower = [(at, tokens, loss - 0.5) for at, tokens, loss in CURVE]
    least = [(at, tokens, loss - 1.5) for at, tokens, loss in CURVE]
    worse = [(at, tokens, loss + 0.25) for at, tokens, loss in CURVE]
    runs = {
        "clm": {1: result(longer), 2: result(longer)},
        "slm": {1: result(lower, reference=300, each=5), 2: result(least, reference=300, each=5)},
        "random": {1: result(worse, each=5), 2: result(worse, each=5)},
        "same": {1: result(CURVE), 2: result(CURVE)},
        "long": {1: result(lower, reference=9000), 2: result(lower, reference=9000)},
        "other": {1: result(lower, first_loss=6.1), 2: result(lower, first_loss=6.001)},
    }
    assert compared_at(runs) == 30
    found = summary(runs)
    assert found["compared"] == {"iteration": 30, "tokens": 300}
    clm, slm, random = (found["arms"][arm] for arm in ("clm", "slm", "random"))
    assert clm["final_loss"]["mean"] == 3.5
    assert slm["difference"]["values"] == [-0.5, -1.5]
    assert slm["difference"]["mean"] == -1.0
    assert slm["difference"]["std"] == pytest.approx(0.5**0.5)
    # CLM's 3.5 is reached where the curves before were 4.0 and 5.0.
    assert slm["tokens_to_reach_baseline"]["values"] == [200, 100]
    assert slm["part_of_baseline_tokens"]["mean"] == 0.5
    # 300 + 5 * 300 FLOPs of SLM are all 300 tokens of CLM; 6 * 300 of CLM are 300 of SLM's.
    assert slm["equal_compute"]["baseline_at_arm_flops"]["values"] == [3.5, 3.5]
    assert slm["equal_compute"]["arm_at_baseline_flops"]["values"] == [3.0, 2.0]
    assert random["part_of_baseline_tokens"]["mean"] is None
    verdicts = {arm: of["verdict"] for arm, of in found["arms"].items()}
    assert verdicts["slm"] == (
        "slm WINS over CLM by 1.0000 nats with all 2 seeds; reaches CLM's final loss with 50% of "
        "its tokens; at CLM's compute it is 1.0000 nats lower; at its own compute it is 1.0000 "
        "nats lower."
    )
    # Its curve ends before it has taken what CLM's takes, not so CLM's.
    assert "random LOSES to CLM by 0.2500 nats with all 2 seeds" in verdicts["random"]
    assert "at CLM's compute" not in verdicts["random"]
    assert "at its own compute it is even" in verdicts["random"]
    assert "same cannot be told from CLM with all 2 seeds" in verdicts["same"]
    assert "at equal compute nothing is known of it" in verdicts["long"]
    assert found["arms"]["other"]["other_start"] == [1]
    assert "its first step's loss is not CLM's" in verdicts["other"]
    assert "first step" not in verdicts["slm"]
    assert "not reached" in results_table(found)
    with pytest.raises(UserError, match="no iteration at which all arms were validated"):
        compared_at(runs | {"never": {1: result([(15, 150, 4.0)])}})
    runs["slm"][2] = result(worse)
    mixed = summary(runs)["arms"]["slm"]["verdict"]
    assert "slm is lower with 1 of 2 seeds only" in mixed
    assert "does not reach CLM's final loss with 1 of 2 seeds" in mixed
    barely = [(at, tokens, loss - 0.001) for at, tokens, loss in CURVE]
    runs["slm"][2] = result(barely)  # lower by 0.5 and 0.001: not more than the spread
    assert "slm cannot be told from CLM" in summary(runs)["arms"]["slm"]["verdict"]
    single = {arm: {1: runs[arm][1]} for arm in ("clm", "slm", "random")}
    told = {arm: of["verdict"] for arm, of in summary(single)["arms"].items()}
    assert "slm ends 0.5000 nats below CLM, with 1 seed: perhaps by chance" in told["slm"]
    assert "random ends 0.2500 nats above CLM, with 1 seed: perhaps" in told["random"]


def test_further_validation_sets() -> None:
    """Their losses are those of the iteration at which the arms are compared."""
    sets = {"general": {10: 3.0, 20: 2.5, 30: 2.25}}
    lower = {"general": {10: 2.0, 20: 1.5}}
    runs = {
        "clm": {1: replace(result(CURVE), others=sets), 2: replace(result(CURVE), others=sets)},
        "slm": {1: replace(result(CURVE[:2]), others=lower)},
        "without": {1: result(CURVE)},
    }
    found = summary(runs)
    losses = {arm: own["other_losses"]["general"] for arm, own in found["arms"].items()}
    assert losses["clm"]["values"] == [2.5, 2.5] and losses["slm"]["values"] == [1.5]
    assert losses["without"]["missing"] == 1
    assert cut(runs["clm"][1], 10).described()["other_losses"] == {"general": 3.0}
    head, *rows = markdown("study", "prose", found).splitlines()[6:12]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (head, *rows[1:4])]
    assert [row[3] for row in cells] == ["general loss", "2.5000 ± 0.0000", "1.5000", "not known"]


def test_scores_of_evaluations() -> None:
    """Of each arm's last checkpoint, in the table only if there are any."""
    some = {"sums acc": 0.5, "prose acc": 0.75}
    runs = {
        "clm": {1: replace(result(CURVE), scores=some), 2: replace(result(CURVE), scores=some)},
        "slm": {1: replace(result(CURVE), scores=some | {"sums acc": 0.625}), 2: result(CURVE)},
        "without": {1: result(CURVE)},
    }
    assert "scores" not in result(CURVE).described()
    assert runs["slm"][1].described()["scores"] == {"sums acc": 0.625, "prose acc": 0.75}
    found = summary(runs)
    assert "scores" not in found["arms"]["without"]
    text = markdown("study", "prose", found)
    assert "Scores of lm-eval's tasks are those of each arm's last checkpoint." in text
    rows = [line.split("|")[4:6] for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["sums acc", "prose acc"] and cells[2] == ["0.500 ± 0.000", "0.750 ± 0.000"]
    assert cells[3:] == [["0.625 (1 of 2 seeds)", "0.750 (1 of 2 seeds)"], ["not known"] * 2]
    assert "lm-eval" not in markdown("study", "prose", summary({"clm": {1: result(CURVE)}}))


def test_a_task_begins(tmp_path: Path) -> None:
    """On what an earlier start of the same left, or anew; one that was killed leaves nothing."""

    def prepared(lr: int) -> Path:
        recipe = read_experiment(write(tmp_path, f"arguments: --lr {lr}{SMALLEST}"))
        (one,) = tasks_of(recipe, None, None)
        one.prepare(tmp_path)
        return tmp_path / one.directory

    directory = prepared(1)
    killed = temporary(directory)
    (killed / "checkpoints").mkdir(parents=True)
    (directory / "log").write_text("begun")
    assert (prepared(1) / "log").read_text() == "begun"
    assert [path.name for path in prepared(2).iterdir()] == ["begun.json"]
    assert [path.name for path in directory.parent.iterdir()] == ["clm-seed1"]
    (directory / "begun.json").unlink()
    (directory / "theirs").write_text("of another")
    with pytest.raises(UserError, match=r"clm-seed1 has no begun\.json"):
        prepared(3)
    assert (directory / "theirs").read_text() == "of another"


STUDY = """
name: small
target: docstrings
seeds: [1]
arguments: >-
  --num-layers 2 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 2 {llama}
  --seq-length 32 --micro-batch-size 4 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant
  --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 64
  --train-data-path {{data}}/docstrings --valid-data-path {{data}}/docstrings --num-workers 0
  --eval-iters 1 --eval-interval 8 --log-interval 1 --save-interval 8
stages:
  data: {{run: "cp -r {corpus} {{out}}/"}}
  reference: {{pretrain: --train-iters 8}}
  scores: {{score: "--slm-reference-load {{reference}} --train-iters 24"}}
arms:
  clm: {{arguments: --train-iters 40}}
  slm: {{arguments: "--train-iters 24 --slm-token-ratio 0.5 --slm-reference-cache {{scores}}"}}
"""


def command(recipe: Path, study: Path) -> list[str]:
    tool = REPOSITORY / "tools" / "run_experiment.py"
    return [sys.executable, str(tool), str(recipe), "-o", str(study), "--jobs", "2"]


def run(recipe: Path, study: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command(recipe, study), *more], capture_output=True, text=True, check=False, timeout=300
    )


def results(study: Path) -> dict[str, Any]:
    """results.json without times."""
    found = json.loads((study / "results.json").read_text())
    for arm in found["arms"].values():
        for seed in arm["seeds"].values():
            assert seed.pop("wall_seconds") > 0
    for summarised in found["summary"]["arms"].values():
        assert summarised.pop("step_seconds")["mean"] > 0
    return found


def test_a_study_killed_and_resumed(corpus: Corpus, tmp_path: Path) -> None:
    text = STUDY.format(llama=" ".join(LLAMA), corpus=f"{corpus.prefix.parent}/.")
    recipe = write(tmp_path, text)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    first = subprocess.Popen(command(recipe, killed), stderr=subprocess.DEVNULL)
    saved = killed / "runs/clm-seed1/checkpoints/latest_checkpointed_iteration.txt"
    while not (saved.exists() and saved.read_text()):
        assert first.poll() is None, (killed / "runs/clm-seed1/log").read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (killed / "runs/clm-seed1/record.json").exists()
    made = (killed / "stages/reference/record.json").stat().st_mtime_ns
    done = run(recipe, killed)
    assert done.returncode == 0, done.stderr
    assert "slm" in done.stdout
    assert (killed / "stages/reference/record.json").stat().st_mtime_ns == made
    log = (killed / "runs/clm-seed1/log").read_text()
    assert "successfully loaded checkpoint" in log  # it went on from where it was

    shutil.copytree(killed, straight)
    for name in ("runs", "stages/scores-seed1"):
        shutil.rmtree(straight / name)
    done = run(recipe, straight)
    assert done.returncode == 0, done.stderr
    assert results(killed) == results(straight)
    check_costs(results(straight)["arms"])
    check_picture(straight)

    # An arm that fails takes nothing else with it, nor does a command for some arms.
    broken = write(tmp_path, text + "  broken: {arguments: --train-iters 0.5}\n")
    done = run(broken, straight, "--arms", "broken")
    assert done.returncode == 2
    assert "broken-seed1 failed with exit code 2" in done.stderr.splitlines()[-1]
    assert "slm" in done.stdout and results(killed) == results(straight)

    # What changed is made again, and a failure names the task and its log.
    changed = write(tmp_path, text.replace("cp -r", "cp -r nowhere"))
    done = run(changed, straight)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert "data failed with exit code 1: cp: cannot stat 'nowhere'" in message
    assert f"{straight}/stages/data/log" in message
    assert not (straight / "stages/data/record.json").exists()
    done = run(write(tmp_path, text.replace("cp -r", "nothing")), straight)
    assert done.returncode == 2
    assert "data: [Errno 2] No such file or directory: 'nothing'" in done.stderr.splitlines()[-1]


def check_costs(arms: dict[str, Any]) -> None:
    """FLOPs of tokens 4 * 32 a step, by 6 (2 for a forward) for each weight of a product."""
    clm, slm = arms["clm"]["seeds"]["1"], arms["slm"]["seeds"]["1"]
    assert clm["tokens_seen"] == clm["tokens_selected"] == 24 * 128  # until both can be compared
    assert clm["curve"][-1][:2] == [40, 40 * 128]
    assert slm["tokens_seen"] == 24 * 128
    assert slm["tokens_selected"] == 24 * 64
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 96)  # projections of attention, SwiGLU
    head = 320 * 32
    attention = 2 * 2 * 32 * 32 // 2 * 2  # scores and values, half of them masked, two layers
    forward = 2 * layers + attention + 2 * head
    assert clm["flops"] == {
        "policy": clm["tokens_seen"] * (6 * layers + 7 * attention // 2 + 6 * head),
        "reference_training": 0,
        "scoring": 0,
    }
    assert slm["flops"]["scoring"] == slm["tokens_seen"] * forward
    assert slm["flops"]["reference_training"] * 3 == clm["flops"]["policy"]
    assert [point[:2] for point in slm["curve"]] == [[8, 1024], [16, 2048], [24, 3072]]
    assert slm["first_loss"] == pytest.approx(clm["first_loss"], rel=1e-5)  # one start and data


def check_picture(study: Path) -> None:
    """The curves are TensorBoard's, as it reads them itself."""
    write_picture(study, "tokens", (), study / "tokens.svg")
    lines = read_picture(study / "tokens.svg").lines
    for arm, line in zip(("clm", "slm"), lines, strict=True):
        events = EventAccumulator(str(study / f"runs/{arm}-seed1/tensorboard")).Reload()
        logged = {each.step: each.value for each in events.Scalars("lm loss validation")}
        np.testing.assert_allclose(line[:, 0], np.array(sorted(logged)) * 128, atol=10)
        np.testing.assert_allclose(line[:, 1], list(logged.values()), atol=2e-3)
