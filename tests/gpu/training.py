"""Runs of megatron_slm.pretrain that the checks start, and what they logged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from logged_run import Run

LLAMA = """
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --mock-data --lr-decay-style constant --eval-iters 0
    --eval-interval 1000 --log-interval 1 --num-workers 2
"""
# TinyLlama's shape: 1.1 billion parameters; a step of 4 micro-batches of 4 x 2048 tokens.
BILLION = f"""
    {LLAMA} --num-layers 22 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 32
    --group-query-attention --num-query-groups 4 --kv-channels 64 --seq-length 2048
    --max-position-embeddings 2048 --vocab-size 31999 --micro-batch-size 4 --global-batch-size 16
    --lr 1e-5 --bf16
"""


def save_reference(directory: Path) -> None:
    """Save a model of a billion parameters in `directory`/reference."""
    saving = f"--train-iters 1 --save {directory}/reference --save-interval 1 --no-save-optim"
    train(directory / "reference-run", f"{BILLION} {saving}")


def train(
    directory: Path,
    arguments: str,
    *,
    ranks: int = 1,
    gpus: int = 1,
    module: str = "megatron_slm.pretrain",
) -> Run:
    """Run a job to its end, or to that of the check's time.

    Args:
        arguments: beside those of TensorBoard, whose logs the Run reads.
        gpus: 0 for the CPU platform.  Where there are fewer than ranks, NCCL has to let ranks share
            one.

    Raises:
        RuntimeError: a rank failed, with the end of what it said.
    """
    directory.mkdir(parents=True)
    ends = min(time.time() + 200, float(os.getenv("CHECK_ENDS", "inf")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if gpus == 0:
        job |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    elif gpus < ranks:
        job |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    command = [sys.executable, "-m", module, "--tensorboard-dir", str(directory / "tensorboard")]
    logs = [directory / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank if gpus >= ranks else 0)}
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [*command, *arguments.split()],
                    env=os.environ | job | own,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes: list[int | None] = [
            process.wait(max(0.0, ends - time.time())) for process in processes
        ]
    except subprocess.TimeoutExpired as late:
        said = [log.read_text()[-1500:] for log in logs]
        raise RuntimeError(f"not done in the check's time: {said}") from late
    finally:
        for process in processes:
            process.kill()
    for code, log in zip(codes, logs, strict=True):
        if code != 0:
            raise RuntimeError(f"{log.name} ended with {code}: {log.read_text()[-1500:]}")
    return Run(directory, [log.read_text() for log in logs], codes)
