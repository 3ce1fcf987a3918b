"""examples/launch.sh with real ranks: killed, restarted, stopped by a signal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs import Corpus
from launch import REPOSITORY, recipe_environment
from megatron_slm.model.architecture import Architecture, to_hugging_face
from megatron_slm.model.import_hf import import_hugging_face
from megatron_slm.model.tensors import hugging_face_shapes

RECIPE = REPOSITORY / "examples" / "pretrain_slm_1b.sh"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    a = Architecture(2, 64, 128, 4, 2, 16, 257, 64, tied=False, **shape)
    (directory / "config.json").write_text(json.dumps(to_hugging_face(a, "bfloat16")))
    tensors = {
        name: torch.randn(size).mul(0.02).bfloat16()
        for name, size in hugging_face_shapes(a).items()
    }
    save_file(tensors, directory / "model.safetensors")
    import_hugging_face(directory, directory / "megatron", 128)
    return directory / "megatron"


# Sizes alone; the rest is the recipe's.
SMALL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --num-query-groups 2 --kv-channels 16 --seq-length 64 --max-position-embeddings 64
    --tokenizer-type NullTokenizer --vocab-size 257 --save-interval 3 --log-interval 1
    --eval-iters 1 --num-workers 0 --split 90,10,0
"""


class Started:
    """A recipe that runs, and what it has said."""

    def __init__(self, log: Path, **settings: object) -> None:
        self.log = log
        self.process = subprocess.Popen(
            ["bash", str(RECIPE)],
            env=recipe_environment(2, **settings),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 120) -> list[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.findall(pattern, self.log.read_text())
            if len(found) >= count:
                return found
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-3000:])


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(line) for line in found.stdout.split()]
    return children + [deeper for child in children for deeper in descendants(child)]


def ranks_of(pid: int) -> list[int]:
    """torchrun's children: the processes that have a rank, and no parent that has."""
    having = {
        each
        for each in descendants(pid)
        if b"\0RANK=" in b"\0" + Path(f"/proc/{each}/environ").read_bytes()
    }
    children = {child for each in having for child in descendants(each)}
    return sorted(having - children)


ITERATION = r"iteration +(\d+)/"


def test_kill_restart_and_stop(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.touch()
    settings = {
        "DATA": corpus.prefix,
        "TOKENIZER": tokenizer,
        "BASE": base,
        "REFERENCE": base,
        "SAVE": save,
        "BATCH": 8,
        "MICRO_BATCH": 2,
        "TOKENS": 2048 * 8 * 100_000,
        "EXTRA": SMALL.replace("\n", " "),
    }
    job = Started(tmp_path / "first.log", **settings)
    try:
        job.wait_for(r"successfully saved checkpoint from iteration +3 ")
        ranks = ranks_of(job.process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        # torchrun starts both anew, and they go on from a checkpoint.
        job.wait_for(r"successfully loaded checkpoint from \S+ .*at iteration (?!0)\d+")
        at = len(re.findall(ITERATION, job.log.read_text()))
        job.wait_for(ITERATION, at + 2)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(60) == 0, job.log.read_text()[-3000:]
    finally:
        for pid in [*descendants(job.process.pid), job.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    last = int(re.findall(ITERATION, job.log.read_text())[-1])
    saved = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved == last


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
    assert "has no address" in refused(MASTER_ADDR="no-such-host.invalid", **there)
    assert "names no interface" in refused(NCCL_SOCKET_IFNAME="nosuch0", **there)
    assert "cannot write" in refused(**there | {"SAVE": "/proc/save"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in refused(MASTER_PORT=port, **there)


def option(script: str, name: str, **settings: str) -> str:
    """What a recipe gives it."""
    done = subprocess.run(
        ["bash", str(RECIPE.with_name(script))],
        env=os.environ | settings | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout)
    return words[words.index(name) + 1]


@pytest.mark.parametrize("size", ["1b", "7b", "13b", "70b"])
def test_references_go_where_policies_look(size: str) -> None:
    policy = f"pretrain_slm_{size}.sh"
    saved = option("train_reference_math.sh", "--save", SIZE=size)
    assert saved == option(policy, "--slm-reference-load")
    assert option("train_reference_math.sh", "--num-layers", SIZE=size) == option(
        policy, "--num-layers"
    )


def test_slurm(tmp_path: Path) -> None:
    """One step with a task on every node, which runs the recipe again; its node is the step's."""
    for name, text in {
        "scontrol": "echo node7; echo node8",
        "srun": 'printf "%s\\n" "$@"; echo "master $MASTER_ADDR"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": 11, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "node[7-8]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = recipe_environment(2, PATH=path, SRUN="--container-image x", **slurm)
    batch = subprocess.run(
        ["bash", str(RECIPE)], env=env, capture_output=True, text=True, check=True
    )
    said = batch.stdout.splitlines()
    assert said[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert said[4:] == ["--container-image", "x", "bash", str(RECIPE), "master node7"]
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
