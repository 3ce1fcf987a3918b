"""A command line is checked, and explained, before torch and Megatron are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from launch import REPOSITORY, recipe_environment
from megatron_slm.errors import UserError
from megatron_slm.selection import NEED_REFERENCE, SCOPES, SCORES, WEIGHTINGS
from megatron_slm.selection.scores import SCORE_FUNCTIONS
from megatron_slm.selection.weights import WEIGHT_FUNCTIONS
from megatron_slm.training.command_line import options
from megatron_slm.training.command_line.first_check import (
    DYNAMICS,
    SCORING,
    TRAINING,
    Job,
    first_check,
)

COMPLETE = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64
    --seq-length 64 --micro-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 256
    --mock-data --train-iters 3 --lr 1e-3 --eval-interval 100
"""
DATA = "--tokenizer-type NullTokenizer --vocab-size 9 --mock-data --seq-length 8"

# What is given beside a complete command line, and what is said of it.
REFUSED = {
    "--slm-token-ratio 60": "--slm-token-ratio must be in (0, 1], not 60; 0.6 is 60% of the tokens",
    "--slm-token-ratio=0": "--slm-token-ratio must be in (0, 1], not 0",
    "--slm-token-ratio nan": "--slm-token-ratio must be in (0, 1], not nan",
    "--slm-token-ratio -0.5": "--slm-token-ratio must be in (0, 1], not -0.5",
    "--slm-token-ratio sixty": "--slm-token-ratio 'sixty' is not a number",
    "--slm-token-ratio --slm-score random": "--slm-token-ratio: expected one argument",
    "--slm-score loss": "argument --slm-score: invalid choice: 'loss'",
    "--slm-token-ration 0.6": "arguments: --slm-token-ration; did you mean --slm-token-ratio?",
    "--slm-token-rat 0.6": "did you mean --slm-token-ratio?",
    "--slm_scope=sequence": "did you mean --slm-scope?",
    "-slm-head dense --SLM-SCORE x": "did you mean --slm-head and --slm-score?",
    "--slm-zzzzzzzz": "unrecognized arguments: --slm-zzzzzzzz",
    "--num-layers two": "--num-layers: invalid int value: 'two'",
    "--slm-token-ratio 0.6": "give its checkpoint with --slm-reference-load",
    "--slm-weighting relu": "give its checkpoint with --slm-reference-load",
    "--slm-reference-load ref": "--slm-reference-load without --slm-token-ratio would train on all",
    "--slm-reference-cache scores --slm-scope sequence": "without --slm-token-ratio",
    "--slm-reference ema:0.9": "without --slm-token-ratio",
    "--slm-token-ratio .6 --slm-reference ema": "give ema:DECAY with a decay in (0, 1)",
    "--slm-token-ratio .6 --slm-reference ema:nan": "give ema:DECAY with a decay in (0, 1)",
    "--slm-token-ratio .6 --slm-reference ema:.9 --slm-reference-cache a": "name a reference each",
    "--slm-token-ratio .6 --slm-score random --slm-reference-offload": "--slm-reference-load alone",
    "--slm-softmax-temperature inf": "must be finite and above 0, not inf",
    "--slm-unselected-weight nan": "must be finite and not negative, not nan",
    "--slm-warmup-tokens -1": "--slm-warmup-tokens must not be negative",
    "--slm-domain-ratio web": "--slm-domain-ratio web: give NAME=RATIO",
    "--slm-domain-ratio web=1.5": "must be in (0, 1]",
    "--slm-score own:": "argument --slm-score: invalid choice: 'own:'",
    "--slm-weighting longce": "--slm-weighting longce compares the policy with a reference",
    "--slm-weighting mile --slm-head dense": "--slm-weighting mile needs --slm-head chunked",
    "--slm-weighting eaft --slm-head dense": "--slm-weighting eaft needs --slm-head chunked",
    "--slm-score-option gamma": "--slm-score-option gamma: give NAME=VALUE, as in gamma=2",
    "--slm-leave-out beside=1": "beside=1: give above=X, below=X or goldfish=K:H",
    "--slm-leave-out goldfish=50": "goldfish=50: give goldfish=K:H, as in goldfish=50:50",
    "--slm-leave-out goldfish=1:5": "goldfish=1:5: K must be at least 2",
    "--slm-leave-out above=high": "above=high: 'high' is not a number",
    "--slm-ratio-steps 5:0.5": "--slm-ratio-schedule steps needs --slm-ratio-steps",
    "--slm-final-token-ratio 0.5": "linear and cosine need --slm-final-token-ratio",
    "--slm-dump-samples 0": "--slm-dump-samples must be at least 1, not 0",
    "--slm-dump-interval 2.5": "--slm-dump-interval '2.5' is not a number",
    "--slm-dump-interval 5": "--slm-dump-dir or --save",
    "--rampup-batch-size 4 4 100": "--step-batch-size-schedule",
    "--save there": "lacks --save-interval (for --save); --help",
    "--use-checkpoint-args": "lacks a checkpoint for --use-checkpoint-args",
    "--use-checkpoint-args --load absent": "there is none in absent",
    "--data-args-path mix.txt": "lacks --split (for --data-args-path)",
}
ACCEPTED = [
    "",
    "--slm-token-ratio 1 --slm-reference-load ref",
    "--slm-token-ratio=0.6 --slm-score=random",
    "--slm-weighting mile --slm-score-option gamma=2",
    "--slm-token-ratio 0.6 --slm-score my.scores:surprise --slm-leave-out goldfish=50:50",
    "--slm-ratio-schedule cosine --slm-final-token-ratio 0.1 --slm-reference-load ref",
    "--slm-domain-ratio web=0.5 books=1 --slm-score policy --an-option-of-megatrons --other -1",
    "--save there --save-interval 5 --slm-dump-interval 2",
    "--slm-token-ratio 0.6 --slm-reference-load a=x b=y --slm-changed rotary_base --num-workers 0",
]


@pytest.mark.parametrize("more", REFUSED)
def test_refused(more: str) -> None:
    with pytest.raises(UserError) as error:
        first_check([*COMPLETE.split(), *more.split()], TRAINING)
    assert REFUSED[more] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more", ACCEPTED)
def test_accepted(more: str) -> None:
    first_check([*COMPLETE.split(), *more.split()], TRAINING)


def lacks(job: Job, line: str) -> list[str]:
    with pytest.raises(UserError) as error:
        first_check(line.split(), job)
    return [part.split()[0] for part in str(error.value).partition("lacks ")[2].split(", --")]


def test_all_that_is_missing_at_once() -> None:
    """Megatron asks for one at a time, mostly by an assertion without words."""
    with pytest.raises(UserError) as error:
        first_check(["--slm-token-ratio", "1"], TRAINING)
    assert str(error.value) == (
        "the command line lacks --num-layers, --hidden-size, --num-attention-heads, "
        "--max-position-embeddings, --seq-length, --micro-batch-size, --tokenizer-type, "
        "--data-path (or --data-args-path, --train-data-path, --mock-data), --train-iters (or "
        "--train-samples), --lr, --eval-interval; --help says what they are"
    )


def test_what_stands_in(tmp_path: Path) -> None:
    """A checkpoint that was trained has more than one that was imported."""
    line = COMPLETE.replace("--num-layers 2 --hidden-size 64 --num-attention-heads 4", "")
    line = line.replace("--seq-length 64", "").replace("--max-position-embeddings 64", "")
    line += f"--use-checkpoint-args --load {tmp_path}"
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("12\n")
    first_check(line.split(), TRAINING)
    tracker.write_text("release")
    assert lacks(TRAINING, line) == ["--seq-length;"]
    file = COMPLETE.replace("--tokenizer-type NullTokenizer", "--tokenizer-type Llama2Tokenizer")
    assert lacks(TRAINING, file) == ["--tokenizer-model"]
    null = COMPLETE.replace("--vocab-size 256", "")
    assert lacks(TRAINING, null) == ["--vocab-size"]


def test_other_jobs() -> None:
    """Scoring documents draws no samples; the model is the reference's, or the checkpoints'."""
    reference = f"{DATA} --micro-batch-size 1 --slm-reference-load a --slm-reference-cache b"
    first_check([*reference.split(), "--by", "document"], SCORING)
    assert lacks(SCORING, reference)[0] == "--global-batch-size"
    taken = "--use-checkpoint-args --load absent --by document"
    first_check([*reference.split(), *taken.split()], SCORING)
    with pytest.raises(UserError, match="--slm-reference-cache: name one directory"):
        first_check([*DATA.split(), "--slm-reference-load", "a"], SCORING)
    assert lacks(DYNAMICS, f"{DATA} --micro-batch-size 1 --dynamics d") == ["--load;"]
    with pytest.raises(UserError, match="required: --dynamics"):
        first_check(DATA.split(), DYNAMICS)


def test_choices() -> None:
    """Written down where torch is not imported, and the same."""
    assert get_args(options.Score) == SCORES
    assert set(options.NEED_REFERENCE) == NEED_REFERENCE
    assert get_args(options.Scope) == SCOPES
    assert get_args(options.Weighting) == WEIGHTINGS
    needs = {name: one.needs for name, one in (SCORE_FUNCTIONS | WEIGHT_FUNCTIONS).items() if one}
    of_policy = {"entropies", "top_entropies"}
    assert set(options.NEED_ENTROPIES) == {name for name in needs if needs[name] & of_policy}


@pytest.mark.parametrize("tasks", [{"SLURM_STEP_NUM_TASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "16"}])
def test_tasks_without_ranks(tasks: dict[str, str]) -> None:
    """Each of them would train by itself, and save to the same directory."""
    environment = recipe_environment(1, PYTHONPATH=REPOSITORY, **tasks)
    environment.pop("RANK", None)
    run = subprocess.run(
        [sys.executable, "-m", "megatron_slm.pretrain", *COMPLETE.split()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 2
    assert f"started {next(iter(tasks.values()))} tasks, and none of them knows" in run.stderr


HELP = """
import contextlib, io, pathlib, runpy, sys
tools = sorted(pathlib.Path(sys.argv[1], "tools").glob("*.py"))
sys.path.insert(0, str(tools[0].parent))
commands = [(tool, []) for tool in tools]
for words in ("token_dynamics classify", "score_reference inspect", "score_reference longppl"):
    name, word = words.split()
    commands.append((tools[0].with_name(f"{name}.py"), [word]))
for tool, words in commands:
    sys.argv = [str(tool), *words, "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(str(tool), run_name="__main__")
    assert said.getvalue().startswith("usage: "), tool
    assert not {"torch", "megatron", "transformers"} & set(sys.modules), tool
sys.argv = ["pretrain", "--help"]
runpy.run_module("megatron_slm.pretrain", run_name="__main__")
"""


def test_help_without_torch() -> None:
    """Of every tool, and of pretraining, whose own options come first."""
    run = subprocess.run(
        [sys.executable, "-c", HELP, str(REPOSITORY)],
        env=recipe_environment(1, PYTHONPATH=REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout
    assert said.index("--help-megatron") < said.index("--slm-token-ratio") < said.index("--lr RATE")
    assert len(said.splitlines()) < 160
