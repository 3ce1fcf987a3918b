"""examples/launch.sh with real ranks: killed, restarted, stopped by a signal."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs import Corpus
from launch import REPOSITORY, recipe_environment
from megatron_slm.model.architecture import to_megatron
from megatron_slm.model.conversion.import_hf import as_options
from random_llama import small_llama, write_random_llama

RECIPE = REPOSITORY / "examples" / "pretrain_slm_1b.sh"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return write_random_llama(directory, small_llama(257, 64), torch.bfloat16)


# Sizes alone; the rest is the recipe's.
SMALL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --num-query-groups 2 --kv-channels 16 --seq-length 64 --max-position-embeddings 64
    --tokenizer-type NullTokenizer --vocab-size 257 --save-interval 3 --log-interval 1
    --eval-iters 1 --num-workers 1 --split 90,10,0
"""


class Started:
    """A recipe that runs on some nodes, all of them this machine, and what it has said."""

    def __init__(self, logs: Path, nodes: list[dict[str, object]]) -> None:
        logs.mkdir()
        self.logs = [logs / f"node{number}.log" for number in range(len(nodes))]
        self.processes = [
            subprocess.Popen(
                ["bash", str(RECIPE)],
                env=recipe_environment(2, **settings),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for log, settings in zip(self.logs, nodes, strict=True)
        ]

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 240) -> list[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.findall(pattern, self.said())
            if len(found) >= count:
                return found
            assert all(one.poll() is None for one in self.processes), self.said()[-6000:]
            time.sleep(0.1)
        raise TimeoutError(self.said()[-6000:])

    def ranks(self, count: int) -> list[int]:
        """Their processes, as soon as there are so many."""
        deadline = time.monotonic() + 60
        while len(found := [rank for one in self.processes for rank in ranks_of(one.pid)]) < count:
            assert time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.1)
        return found

    def signal_all(self, number: signal.Signals) -> None:
        """As Slurm does: every process of the job."""
        running = [one.pid for one in self.processes if one.poll() is None]
        for pid in [each for one in running for each in [*descendants(one), one]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ended(self) -> None:
        """With success, and without torchrun's help, which kills after 30 s."""
        for one in self.processes:
            assert one.wait(120) == 0, self.said()[-6000:]
        assert "death signal" not in self.said()


def descendants(pid: int) -> list[int]:
    children = list[int]()
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return children + [deeper for child in children for deeper in descendants(child)]


def variables(pid: int) -> dict[str, str]:
    """Of a process; none of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def ranks_of(pid: int) -> list[int]:
    """torchrun's children: the processes that have a rank, and no parent that has."""
    having = {each for each in descendants(pid) if "RANK" in variables(each)}
    children = {child for each in having for child in descendants(each)}
    return sorted(having - children)


ITERATION = r"iteration +(\d+)/"


def test_kill_restart_stop_and_go_on(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    save, tokenizer = tmp_path / "save", tmp_path / "tokenizer.model"
    tokenizer.touch()
    own = {"DATA": corpus.prefix, "TOKENIZER": tokenizer, "BASE": base, "REFERENCE": base}
    own |= {"SAVE": save, "BATCH": 8, "MICRO_BATCH": 2, "TOKENS": 2048 * 8 * 100_000}
    own |= {"EXTRA": SMALL.replace("\n", " "), "MASTER_PORT": free_port()}
    nodes = {"NODES": 2, "RANKS_PER_NODE": 1, "MASTER_ADDR": "127.0.0.2"}
    job = Started(
        tmp_path / "first",
        [own | nodes | {"NODE_RANK": n, "NODE_ADDR": f"127.0.0.{3 + n}"} for n in (0, 1)],
    )
    try:
        job.wait_for(r"successfully saved checkpoint from iteration +3 ")
        ranks = job.ranks(2)
        assert {variables(rank)["MASTER_ADDR"] for rank in ranks} == {"127.0.0.3"}
        for lost in [*descendants(ranks[1]), ranks[1]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(lost, signal.SIGKILL)
        # torchrun starts both anew, and they go on from a checkpoint.
        job.wait_for(r"successfully loaded checkpoint from \S+ .*at iteration (?!0)\d+")
        at = len(re.findall(ITERATION, job.said()))
        job.wait_for(ITERATION, at + 4)
        job.signal_all(signal.SIGTERM)
        job.ended()
    finally:
        job.signal_all(signal.SIGKILL)
    last = max(map(int, re.findall(ITERATION, job.said())))
    tracker = save / "latest_checkpointed_iteration.txt"
    assert int(tracker.read_text()) == last

    # Under Slurm, whose time is up before the first step: the batch script alone is told.  The step
    # takes longer than the second in which ranks are told.
    for name, text in {
        "scontrol": f'echo "$@" >> {tmp_path}/queued',
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 SLURM_STEP_ID=0 exec "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": 11, "SLURM_JOB_NUM_NODES": 1}
    slurm |= {"MASTER_ADDR": "localhost", "REQUEUE": 1, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = Started(tmp_path / "second", [own | slurm | {"BATCH": 800}])
    try:
        job.ranks(2)
        job.processes[0].send_signal(signal.SIGUSR1)
        job.ended()
    finally:
        job.signal_all(signal.SIGKILL)
    assert f"at iteration {last}" in job.said()
    assert re.findall(ITERATION, job.said()) == [str(last + 1)]
    assert int(tracker.read_text()) == last + 1
    assert (tmp_path / "queued").read_text() == "requeue 11\n"


def test_a_scoring_job_ends_at_once(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    """It goes on where it was, so that it can be killed."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.touch()
    own = {"DATA": corpus.prefix, "TOKENIZER": tokenizer, "BASE": base, "REFERENCE": base}
    own |= {"SAVE": tmp_path / "save", "SCORE": 1, "CACHE": tmp_path / "cache", "BATCH": 8}
    own |= {"TOKENS": 2048 * 8 * 100_000, "EXTRA": SMALL.replace("\n", " ")}
    job = Started(tmp_path / "logs", [own])
    try:
        ranks = job.ranks(2)
        job.signal_all(signal.SIGTERM)
        assert job.processes[0].wait(60) == 0, job.said()[-6000:]
    finally:
        job.signal_all(signal.SIGKILL)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def free_port() -> int:
    """Below those that Linux gives to connections, so that none takes it before the job does."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port := random.randrange(10_000, 32_768)))
            return port


def refused(**settings: object) -> str:
    done = subprocess.run(
        ["bash", str(RECIPE)],
        env=recipe_environment(2, **settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_nodes_are_checked(base: Path, tmp_path: Path) -> None:
    there = {"TOKENIZER": base, "BASE": base, "REFERENCE": base, "SAVE": tmp_path / "save"}
    assert "0 GPUs, and GPUS_PER_NODE is 8" in refused(GPUS_PER_NODE=8, **there)
    assert "no/such/base is not there" in refused(**there | {"BASE": "no/such/base"})
    assert "invalid has no address" in refused(MASTER_ADDR="no-such-host.invalid", **there)
    for wrong in ("nosuch0", "=l", "nosuch0,nosuch1"):
        assert "names no interface" in refused(NCCL_SOCKET_IFNAME=wrong, **there)
    # What names some is passed over, to what is looked at next.
    for right in ("l", "nosuch0,lo", "=nosuch0,lo", "^lo"):
        nccl = {"NCCL_SOCKET_IFNAME": right, "NCCL_IB_HCA": "=nosuch_0:1"}
        assert "NCCL_IB_HCA names no adapter" in refused(**there, **nccl)
    assert "PYTHON_ENV fails: false" in refused(PYTHON_ENV="false", **there)
    assert "cannot write" in refused(**there | {"SAVE": "/proc/save"})
    # All that is missing, in one line.
    missing = {"DATA": "0.3 no/web 0.7 no/books", "BASE": "no/base", "REFERENCE": "no/reference"}
    said = refused(**there | missing)
    assert said.count("error: ") == 1
    for path in ("no/web.idx", "no/books.idx", "no/base", "no/reference"):
        assert f"{path} is not there" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in refused(MASTER_PORT=port, **there)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("package", [None, "transformer_engine.pytorch", "apex"])
def test_a_distributed_optimizer_needs_its_adam(
    gpus: int, package: str | None, base: Path, tmp_path: Path
) -> None:
    """Without one several GPUs are refused before torchrun starts; a single one does without."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "nvidia-smi": f'[ "$1" != --list-gpus ] || seq {gpus}',
        "torchrun": 'printf "%s\n" "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    if package is not None:
        module = tmp_path / "site" / package.replace(".", "/") / "optimizers"
        module.mkdir(parents=True)
        for directory in (module, *module.parents[: package.count(".") + 1]):
            (directory / "__init__.py").write_text("class FusedAdam: ...\n")
    there = {"TOKENIZER": base, "BASE": base, "REFERENCE": base, "SAVE": tmp_path / "save"}
    for name in ("bin", "idx"):
        (tmp_path / f"data.{name}").touch()
    settings = {
        "DATA": tmp_path / "data",
        "GPUS_PER_NODE": gpus,
        "EXTRA": "--moe-router-topk 2 --moe-grouped-gemm --moe-permute-fusion",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    paths = f"{tmp_path / 'site'}:{REPOSITORY}"
    done = subprocess.run(
        ["bash", str(RECIPE)],
        env=recipe_environment(gpus, **there | settings, PYTHONPATH=paths),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    distributed = "--use-distributed-optimizer" in done.stdout.splitlines()
    if package is None and gpus > 1:
        assert done.returncode == 2 and not done.stdout
        assert "--use-distributed-optimizer needs Transformer Engine or Apex" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert distributed == (package is not None)
        assert ("note: without Transformer Engine or Apex" in done.stderr) == (not distributed)
        assert ("--overlap-param-gather" in done.stdout.splitlines()) == distributed
        assert "--overlap-grad-reduce" in done.stdout.splitlines()
        grouped = package is not None and package.startswith("transformer_engine")
        assert ("--moe-grouped-gemm" in done.stdout.splitlines()) == grouped
        assert ("--moe-permute-fusion" in done.stdout.splitlines()) == grouped
        assert "--moe-router-topk" in done.stdout.splitlines()


def dry_run(script: str, **settings: str) -> list[str]:
    """Return the command of a recipe."""
    done = subprocess.run(
        ["bash", str(RECIPE.with_name(script))],
        env=os.environ | settings | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


def option(script: str, name: str, **settings: str) -> str:
    """Return the value that a recipe gives to an option."""
    words = dry_run(script, **settings)
    return words[words.index(name) + 1]


def test_extra_is_read_as_import_prints_it(tmp_path: Path) -> None:
    mistral = replace(small_llama(257, 64), window=10)
    printed = as_options(to_megatron(mistral))
    assert "'(9,0)'" in printed
    more = f"--note \"it's  two\" '' * $HOME $(touch${{IFS}}{tmp_path}/ran) \\\\"
    words = dry_run(RECIPE.name, EXTRA=f"{printed}\n {more}")
    at = len(words) - 7
    assert words[:at] == [*dry_run(RECIPE.name), *shlex.split(printed)]
    ran = f"$(touch${{IFS}}{tmp_path}/ran)"
    assert words[at:] == ["--note", "it's  two", "", "*", "$HOME", ran, "\\"]
    assert dry_run(RECIPE.name, EXTRA=" \n ") == dry_run(RECIPE.name)
    assert not list(tmp_path.iterdir())
    assert "a quote is not closed in EXTRA: --window-size '(9" in refused(EXTRA="--window-size '(9")


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("when", ["before", "while told", "later"])
def test_the_status_is_that_of_what_was_started(code: int, when: str) -> None:
    """Whether it ends before it is waited for, or while a signal ends the wait."""
    seconds = {"before": 0, "while told": 0.4, "later": 1.5}[when]
    script = f"""
        set -euo pipefail
        source {RECIPE.with_name("launch.sh")}
        trap 'sleep 0.6' TERM
        (trap '' TERM; sleep {seconds}; exit {code}) &
        started=$!
        (sleep 0.2; kill -TERM $$) &
        {"sleep 0.6" if when == "before" else ""}
        _wait_for $started
        exit $status
    """
    assert subprocess.run(["bash", "-c", script], check=False, timeout=30).returncode == code


SIZES = ("1b", "7b", "13b", "70b", "qwen3-8b", "llama3-8b", "qwen3-30b-a3b", "mixtral-8x7b")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("domain", ["math", "general"])
def test_references_go_where_policies_look(domain: str, size: str) -> None:
    name = "general" if domain == "general" else size.replace("-", "_")
    policy = f"pretrain_slm_{name}.sh"
    reference = f"train_reference_{domain}.sh"
    saved = option(reference, "--save", SIZE=size)
    assert saved == option(policy, "--slm-reference-load", SIZE=size)
    assert option(reference, "--num-layers", SIZE=size) == option(policy, "--num-layers", SIZE=size)


def test_general_recipe_is_the_papers() -> None:
    paper = {"--slm-token-ratio": "0.6", "--lr": "1e-4", "--seq-length": "2048"}
    script = "pretrain_slm_general.sh"
    assert {name: option(script, name) for name in paper} == paper
    samples = int(option(script, "--train-samples"))
    assert samples * 2048 == 80_000_000_000
    assert int(option(script, "--global-batch-size")) * 2048 == 2**20
    mix = option(script, "--data-args-path")
    assert (
        "general-80b.yaml --data-root data --output-prefix data/general-80b"
        in (REPOSITORY / "examples" / "mixes" / "general-80b.yaml").read_text()
    )
    assert mix == "data/general-80b.data-args.txt"


def test_slurm(tmp_path: Path) -> None:
    """One step with a task on every node, which runs the recipe again; its node is the step's."""
    for name, text in {
        "scontrol": "echo node7; echo node8",
        "srun": 'printf "%s\\n" "$@"; echo "master $MASTER_ADDR" "$SRUN_CPUS_PER_TASK"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": 11, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "node[7-8]"}
    slurm |= {"SLURM_CPUS_PER_TASK": 96}
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = recipe_environment(2, PATH=path, SRUN="--container-image x", **slurm)
    batch = subprocess.run(
        ["bash", str(RECIPE)], env=env, capture_output=True, text=True, check=True
    )
    said = batch.stdout.splitlines()
    assert said[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert said[4:] == ["--container-image", "x", "bash", str(RECIPE), "master node7 96"]
    dry = subprocess.run(
        ["bash", str(RECIPE)],
        env=env | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    command = shlex.split(dry.stdout)
    assert command[0] == "torchrun"
    assert {"--nnodes=2", "--rdzv-endpoint=node7:29500", "--rdzv-id=11"} <= {
        re.sub(r":\d+$", ":29500", word) for word in command
    }
