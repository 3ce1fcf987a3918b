"""Run a module as ranks of a real gloo job, and read what it left behind."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parent.parent


@dataclass
class Run:
    """directory: where the job ran; outputs, codes: output and exit code of each rank."""

    directory: Path
    outputs: list[str]
    codes: list[int]

    def scalars(self, tag: str) -> dict[int, float]:
        """A TensorBoard scalar by iteration."""
        events = EventAccumulator(str(self.directory / "tensorboard"))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    def tags(self) -> list[str]:
        events = EventAccumulator(str(self.directory / "tensorboard"))
        events.Reload()
        return events.Tags()["scalars"]


# Ranks are forked from a process that has torch, and what Megatron's tokenizers import, already:
# most of the time of a short run.  What torch reads from the environment has to be there before.
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    ["torch", "torch._dynamo", "transformers.models.auto.tokenization_auto"]
)


def launch(
    ranks: int,
    command: list[str],
    directory: Path,
    *,
    check: bool = True,
    timeout: float = 300,
    fresh_threads: int | None = None,
) -> Run:
    """Start `ranks` processes of `python command...` in `directory` and wait for them.

    Without torchrun, which kills the other ranks as soon as one has failed: here every rank must
    end by itself.  With fresh_threads each rank is a Python started anew, with that many threads.
    """
    files, processes = start(ranks, command, directory, fresh_threads)
    deadline = time.monotonic() + timeout
    try:
        codes = [_exit_code(process, deadline) for process in processes]
    finally:
        for process in processes:
            process.kill()
    run = Run(directory, [file.read_text() for file in files], codes)
    if check and any(codes):
        failed = next(rank for rank, code in enumerate(codes) if code)
        raise AssertionError(
            f"rank {failed} of {ranks} left with {codes[failed]}:\n{run.outputs[failed][-4000:]}"
        )
    return run


def start(
    ranks: int, command: list[str], directory: Path, fresh_threads: int | None = None
) -> tuple[list[Path], list[Any]]:
    """Start them; each one's output file, and process."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    files = [directory / f"rank{rank}.log" for rank in range(ranks)]
    begin = _start_forked if fresh_threads is None else _start_fresh
    return files, [
        begin(
            command,
            directory,
            job
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | ({} if fresh_threads is None else {"OMP_NUM_THREADS": str(fresh_threads)}),
            file,
        )
        for rank, file in enumerate(files)
    ]


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
    process.start()
    return process


def run_command(command: list[str], directory: Path, job: dict[str, str], file: Path) -> None:
    """In the forked process: what `python command...` would do."""
    output = file.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # not that of this process
    os.environ |= job
    os.chdir(directory)
    sys.path[:0] = job["PYTHONPATH"].split(os.pathsep)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _exit_code(process: Any, deadline: float) -> int:
    seconds = max(0.1, deadline - time.monotonic())
    if isinstance(process, subprocess.Popen):
        return process.wait(seconds)
    process.join(seconds)
    if process.exitcode is None:
        raise TimeoutError(f"a rank did not end within {seconds:.0f} s")
    return process.exitcode


def pretrain(
    ranks: int,
    arguments: list[str],
    directory: Path,
    *,
    module: str = "megatron_slm.pretrain",
    check: bool = True,
    timeout: float = 300,
    fresh_threads: int | None = None,
) -> Run:
    """Run a pretraining module with TensorBoard logs in directory/tensorboard."""
    command = ["-m", module, "--tensorboard-dir", "tensorboard", *arguments]
    return launch(
        ranks, command, directory, check=check, timeout=timeout, fresh_threads=fresh_threads
    )


def recipe_environment(ranks: int, **settings: object) -> dict[str, str]:
    """For a script of examples/ on this machine: no GPUs, a port of its own, its variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"GPUS_PER_NODE": 0, "RANKS_PER_NODE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    own |= {"PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": 1} | settings
    return os.environ | {name: str(value) for name, value in own.items()}
