"""Run a module as ranks of a real gloo job, and read what it left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


def launch(
    ranks: int,
    command: list[str],
    directory: Path,
    *,
    check: bool = True,
    timeout: float = 300,
    threads: int = 1,
) -> Run:
    """Start `ranks` processes of `python command...` in `directory` and wait for them.

    Without torchrun, which kills the other ranks as soon as one has failed: here every rank must
    end by itself.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    files = [directory / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(files):
        with file.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=directory,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
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


def pretrain(
    ranks: int,
    arguments: list[str],
    directory: Path,
    *,
    module: str = "megatron_slm.pretrain",
    check: bool = True,
    timeout: float = 300,
    threads: int = 1,
) -> Run:
    """Run a pretraining module with TensorBoard logs in directory/tensorboard."""
    command = ["-m", module, "--tensorboard-dir", "tensorboard", *arguments]
    return launch(ranks, command, directory, check=check, timeout=timeout, threads=threads)
