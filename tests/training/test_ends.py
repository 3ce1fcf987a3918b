"""How commands end: an error once and not once a rank, Ctrl-C by one line; and what they note."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from launch import REPOSITORY, recipe_environment
from megatron_slm.planning.launch_recipe import LaunchRecipe
from megatron_slm.planning.recipe import parse
from megatron_slm.training.command_line.first_check import options_in
from megatron_slm.training.command_line.idle_options import without_effect

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
PRETRAIN = "-m megatron_slm.pretrain".split()
COMPLETE = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64
    --seq-length 64 --micro-batch-size 2 --tokenizer-type NullTokenizer --vocab-size 256
    --mock-data --train-iters 3 --lr 1e-3 --eval-interval 100
"""
PATIENCE = 120  # seconds, before a command counts as hanging


@contextmanager
def started(directory: Path, *command: object) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start Python in its own process group, as a shell does; give it and the file it prints to."""
    output = directory / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=directory,
            env=recipe_environment(1, PYTHONPATH=REPOSITORY),
            stdout=file,
            stderr=file,
            start_new_session=True,
            text=True,
        )
    try:
        yield process, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def interrupt(process: subprocess.Popen[str], output: Path, when: str) -> tuple[int, str]:
    """Ctrl-C when that is printed: exit code, and what is printed from then on."""
    deadline = time.monotonic() + PATIENCE
    while when not in output.read_text():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.02)
    before = len(output.read_text())
    os.killpg(process.pid, signal.SIGINT)
    return process.wait(PATIENCE), output.read_text()[before:]


def test_error_once_under_torchrun(tmp_path: Path) -> None:
    """Two ranks find it, one prints it, and torchrun's own report ends with it."""
    command = [*TORCHRUN, *PRETRAIN, *COMPLETE.split(), "--slm-token-ratio", 60]
    with started(tmp_path, *command) as (process, output):
        assert process.wait(PATIENCE) == 1  # torchrun's
    lines = output.read_text().splitlines()
    error = "error: --slm-token-ratio must be in (0, 1], not 60; 0.6 is 60% of the tokens"
    assert lines.count(error) == 1
    assert error in lines[-2]


def test_error_of_one_rank(tmp_path: Path) -> None:
    """What ranks have in common is printed by one of them, what one alone finds by that one."""
    raising = (
        "import sys; from megatron_slm.errors import *\n"
        "with exit_on_user_error(): raise UserError(sys.argv[1])"
    )
    outputs = []
    for rank, message in enumerate(["shard 3 is missing", "shard 3 is missing", "disk full"]):
        directory = tmp_path / "attempt_0" / str(rank)
        directory.mkdir(parents=True)
        environment = recipe_environment(1, PYTHONPATH=REPOSITORY, RANK=rank)
        environment["TORCHELASTIC_ERROR_FILE"] = str(directory / "error.json")
        command = [sys.executable, "-c", raising, message]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2
        outputs.append(done.stderr)
    assert outputs == ["error: shard 3 is missing\n", "", "error: disk full\n"]


def test_nothing_can_be_printed() -> None:
    """Standard output or standard error is on a full disk, or a pipe that nobody reads."""
    printing = (
        "import sys; from megatron_slm.errors import *\n"
        "with exit_on_user_error():\n"
        "    print('right')\n"
        "    if len(sys.argv) > 1: raise UserError(sys.argv[1])"
    )
    end, pipe = os.pipe()
    os.close(end)
    full = os.open("/dev/full", os.O_WRONLY)
    for unbuffered in ("", "1"):
        environment = recipe_environment(1, PYTHONPATH=REPOSITORY, PYTHONUNBUFFERED=unbuffered)
        run = partial(subprocess.run, env=environment, text=True, check=False, timeout=60)
        for place, why in ((full, "No space left on device"), (pipe, "Broken pipe")):
            done = run([sys.executable, "-c", printing], stdout=place, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (2, f"error: standard output: {why}\n")
        command = [sys.executable, "-c", printing, "wrong"]
        done = run(command, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        done = run(command, stdout=subprocess.PIPE, stderr=full)
        assert (done.returncode, done.stdout) == (2, "right\n")
    command[2] = printing.replace("raise UserError(sys.argv[1])", "raise OSError(28, 'elsewhere')")
    done = run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_no_room_for_temporary_files() -> None:
    """On any of the disks that Python knows of, as torch finds when it is imported."""
    making = (
        "import resource, tempfile; from megatron_slm.errors import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with exit_on_user_error(): tempfile.gettempdir()"
    )
    done = subprocess.run(
        [sys.executable, "-c", making],
        env=recipe_environment(1, PYTHONPATH=REPOSITORY),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No usable temporary directory found in ")
    assert done.stderr.endswith("; make room in one, or name another by TMPDIR\n")


def test_interrupted_ranks(tmp_path: Path) -> None:
    """Under torchrun, which prints how it ended itself: nothing of ours beside one line."""
    line = COMPLETE.replace("--train-iters 3", "--train-iters 100000 --log-interval 1")
    line += f"--save {tmp_path} --load {tmp_path} --save-interval 2 --num-workers 1"
    with started(tmp_path, *TORCHRUN, *PRETRAIN, *line.split()) as (process, output):
        _, said = interrupt(process, output, "iteration        4/")
    ours = f"interrupted: the same command goes on from the last checkpoint in {tmp_path}"
    assert said.splitlines().count(ours) == 1 and said.count("interrupted: ") == 1
    assert str(REPOSITORY / "megatron_slm") not in said and "megatron/training" not in said


def test_interrupted_start(tmp_path: Path) -> None:
    """Without torchrun, while Megatron is imported."""
    with started(tmp_path, *PRETRAIN, *COMPLETE.split()) as (process, output):
        code, said = interrupt(process, output, "running on the CPU platform")
    assert (code, said) == (130, "interrupted: nothing was saved, as there is no --save\n")


def test_interrupted_study(tmp_path: Path) -> None:
    """The command that is run gets Ctrl-C, too, and says nothing here."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: small\ntarget: none\nranks: 1\nseeds: [1]\narguments: --lr 1\ntraining: --seed 1\n"
        "stages: {wait: {run: python -c 'import time; print(7); time.sleep(600)'}}\n"
        "arms: {clm: {arguments: '--data-path {wait}'}}\n"
    )
    tool = REPOSITORY / "tools" / "run_experiment.py"
    with started(tmp_path, tool, recipe, "-o", tmp_path / "study") as (process, output):
        code, said = interrupt(process, output, "wait")
    assert code == 130 and "Traceback" not in said
    last = "interrupted: the same command goes on with what is not done"
    assert said.splitlines()[-1] == last
    assert said.count("interrupted") == 1


CHILDREN = """
import multiprocessing, sys, time
from megatron_slm.errors import exit_on_user_error
def work():
    time.sleep(float(sys.argv[1]))
with exit_on_user_error("the same command goes on"):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        child.join()
        print("cleaned up", flush=True)
"""


def test_interrupted_children(tmp_path: Path) -> None:
    """They leave it to their parent, which cleans up; a second Ctrl-C does not wait for that."""
    with started(tmp_path, "-c", CHILDREN, 1.5) as (process, output):
        code, said = interrupt(process, output, "begun")
    assert (code, said) == (130, "cleaned up\ninterrupted: the same command goes on\n")
    with started(tmp_path, "-c", CHILDREN, 600) as (process, output):
        for _ in range(2):
            deadline = time.monotonic() + PATIENCE
            while "begun" not in output.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(PATIENCE) == 130
        assert output.read_text() == "begun\n"
        os.killpg(process.pid, signal.SIGKILL)  # the child


DROPPED = """
import os, signal, time
from megatron_slm.errors import exit_on_user_error
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
with exit_on_user_error("the same command goes on"):
    if os.fork() == 0:
        os._exit(0)
    time.sleep(600)
"""


def test_interrupted_where_python_drops_it(tmp_path: Path) -> None:
    """Exceptions in callbacks of a fork, and in destructors, go nowhere."""
    with started(tmp_path, "-c", DROPPED) as (process, output):
        assert process.wait(PATIENCE) == 130
    assert output.read_text() == "interrupted: the same command goes on\n"


def notes(more: str) -> list[str]:
    """Options that a run says have no effect."""
    command = [*COMPLETE.split(), *more.split()]
    args: Any = parse(LaunchRecipe(command, 1), 0, 256)
    lines = without_effect(args, options_in(command), False, args.slm_head or "chunked")
    assert all(line.startswith("note: --") and "\n" not in line for line in lines)
    return [line.split()[1] for line in lines]


IDLE: dict[str, Sequence[str]] = {
    "": [],
    "--slm-token-ratio 1 --slm-scope sequence": ["--slm-scope"],
    "--slm-warmup-tokens 64 --slm-unselected-weight 0.1 --slm-score random": [
        "--slm-unselected-weight",
        "--slm-score",
        "--slm-warmup-tokens",
    ],
    "--slm-token-ratio .5 --slm-score random --slm-scope sequence --slm-warmup-tokens 64": [],
    # 3 iterations of 2 samples of 64 tokens
    "--slm-token-ratio .5 --slm-score random --slm-warmup-tokens 384": ["--slm-token-ratio"],
    "--slm-token-ratio .5 --slm-score random --slm-global-batch carried": ["--slm-global-batch"],
    "--slm-token-ratio .5 --slm-score random --slm-softmax-temperature 2": [
        "--slm-softmax-temperature"
    ],
    "--slm-token-ratio .5 --slm-score random --slm-ratio-decay-iters 2": [
        "--slm-ratio-decay-iters"
    ],
    "--slm-token-ratio .5 --slm-score random --slm-reference-load r": ["--slm-reference-load"],
    "--slm-token-ratio .5 --slm-reference-load r": [],
    "--slm-dump-samples 4 --slm-dump-dir d --slm-dump-train-samples": [
        "--slm-dump-dir",
        "--slm-dump-samples",
        "--slm-dump-train-samples",
    ],
    "--slm-changed rotary_base": ["--slm-changed"],
    "--use-flash-attn": ["--use-flash-attn"],
    "--cross-entropy-loss-fusion": ["--cross-entropy-loss-fusion"],
    "--cross-entropy-loss-fusion --slm-head dense": [],
    "--transformer-impl transformer_engine": ["--transformer-impl"],
    "--transformer-impl local --attention-backend unfused": [],
    "--attention-backend flash": ["--attention-backend"],
    "--attention-backend fused --cp-comm-type a2a": ["--attention-backend", "--cp-comm-type"],
}


def test_options_without_effect() -> None:
    """As Megatron's own parser and validation leave them; Transformer Engine is not installed."""
    assert {more: notes(more) for more in IDLE} == IDLE
