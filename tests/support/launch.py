"""Run a module as ranks of a real gloo job, and read what it left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore

from logged_run import Run

SUPPORT = Path(__file__).parent
REPOSITORY = SUPPORT.parents[1]
PYTHONPATH = os.pathsep.join([str(REPOSITORY), str(SUPPORT)])


@dataclass
class Job:
    """files, processes: output file and process of each rank; store: where they meet, while it is
    kept."""

    files: list[Path]
    processes: list[Any]
    store: TCPStore


# What torch reads from the environment has to be there before it is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["megatron_imported"])  # if it cannot be, run_command says so


def launch(
    ranks: int,
    command: list[str],
    directory: Path,
    *,
    check: bool = True,
    timeout: float = 900,
    fresh_threads: int | None = None,
    apart: bool = False,
) -> Run:
    """Start `ranks` processes of `python command...` in `directory` and wait for them.

    Without torchrun, which kills the other ranks as soon as one has failed: here every rank must
    end by itself.  With fresh_threads each rank is a Python started anew, with that many threads
    and without Megatron.  With apart each rank has a node's disk of its own, directory/node0 for
    the first.
    """
    job = start(ranks, command, directory, fresh_threads, apart)
    deadline = time.monotonic() + timeout
    try:
        codes = [_exit_code(process, deadline) for process in job.processes]
    finally:
        for process in job.processes:
            process.kill()
    run = Run(directory, [file.read_text() for file in job.files], codes)
    if None in codes or (check and any(codes)):
        # One that failed tells more than those that waited for it.
        failed = min(range(ranks), key=lambda rank: (not codes[rank], codes[rank] is not None))
        left = f"left with {codes[failed]}" if codes[failed] else f"did not end in {timeout} s"
        raise AssertionError(f"rank {failed} of {ranks} {left}:\n{run.outputs[failed][-4000:]}")
    return run


def start(
    ranks: int,
    command: list[str],
    directory: Path,
    fresh_threads: int | None = None,
    apart: bool = False,
) -> Job:
    directory.mkdir(parents=True, exist_ok=True)
    # As torchrun does: a port that is free when rank 0 is told of it may not be when it listens.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "PYTHONPATH": PYTHONPATH,
    }
    if fresh_threads is not None:
        environment["OMP_NUM_THREADS"] = str(fresh_threads)
    begin = _start_forked if fresh_threads is None else _start_fresh
    job = Job([directory / f"rank{rank}.log" for rank in range(ranks)], [], store)
    for rank, file in enumerate(job.files):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        node = directory / f"node{rank}" if apart else directory
        node.mkdir(exist_ok=True)
        job.processes.append(begin(command, node, environment | own, file))
    return job


def _start_fresh(command: list[str], directory: Path, job: dict[str, str], file: Path) -> Any:
    with file.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            env=os.environ | job,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _start_forked(command: list[str], directory: Path, job: dict[str, str], file: Path) -> Any:
    process = FORKING.Process(target=run_command, args=(command, directory, job, file))
    with patch.dict(os.environ, PYTHONPATH=PYTHONPATH):  # for the process that forks
        process.start()
    return process


def run_command(command: list[str], directory: Path, job: dict[str, str], file: Path) -> None:
    """In the forked process: what `python command...` would do."""
    output = file.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    assert "megatron_imported" in sys.modules
    multiprocessing.set_start_method(None, force=True)  # not that of this process
    os.environ |= job
    os.chdir(directory)
    sys.path[:0] = job["PYTHONPATH"].split(os.pathsep)
    if command[0] == "-m":
        sys.path.insert(0, "")
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _exit_code(process: Any, deadline: float) -> int | None:
    """None: it has not ended."""
    seconds = max(0.1, deadline - time.monotonic())
    if isinstance(process, subprocess.Popen):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode
    process.join(seconds)
    return process.exitcode


def pretrain(
    ranks: int,
    arguments: list[str],
    directory: Path,
    *,
    module: str = "megatron_slm.pretrain",
    check: bool = True,
    timeout: float = 900,
    fresh_threads: int | None = None,
) -> Run:
    """Run a pretraining module with TensorBoard logs in directory/tensorboard."""
    command = ["-m", module, "--tensorboard-dir", "tensorboard", *arguments]
    return launch(
        ranks, command, directory, check=check, timeout=timeout, fresh_threads=fresh_threads
    )


def recipe_environment(ranks: int, **settings: object) -> dict[str, str]:
    """For a script of examples/ on this machine: no GPUs, any port that is free, its variables."""
    own = {"GPUS_PER_NODE": 0, "RANKS_PER_NODE": ranks, "MASTER_PORT": 0, "OMP_NUM_THREADS": 1}
    own |= {"PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": 1} | settings
    return os.environ | {name: str(value) for name, value in own.items()}
