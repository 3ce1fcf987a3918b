"""Start a job: check its command line, and prepare this machine, before Megatron is imported."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable

from megatron_slm.errors import UserError, exit_on_user_error
from megatron_slm.training.command_line.first_check import TRAINING, Job, first_check
from megatron_slm.training.command_line.option_groups import add_group

# What torchrun would set for a single rank.  Port 0 stands for any that is free.
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}
# Launchers that start several tasks, and where these find how many there are.
TASKS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE"}


def start(job: Job, work: Callable[[], None]) -> None:
    """Check the command line, install the CPU platform where there is no GPU, and do the work.

    A process that torchrun did not start works as the only rank; it is refused if it is one of
    several tasks, since each of them would run the whole job and write to the same files.

    Args:
        job: says what the command line may contain.
        work: does the work.  Nothing may import Megatron before it is called.
    """
    with exit_on_user_error("the same command starts again"):
        go_on = first_check(sys.argv[1:], job)
        check_alone()
        if "RANK" not in os.environ:
            os.environ |= ONE_RANK
        with exit_on_user_error(go_on, at_once=True):
            use_device()
            work()


def check_alone() -> None:
    """Refuse to be one of several tasks that do not know each other.

    Raises:
        UserError: srun or mpirun started this process and others, and it does not know its rank.
    """
    if "RANK" in os.environ:
        return
    for launcher, name in TASKS.items():
        tasks = os.getenv(name, "1")
        if tasks != "1":
            raise UserError(
                f"{launcher} started {tasks} tasks, and none of them knows its rank: let it start "
                "one torchrun on each node (as examples/launch.sh does), or set RANK, LOCAL_RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )


def use_device() -> None:
    """Install the CPU platform if there is no GPU; Transformer Engine and Apex, whose kernels need
    one, then count as not installed.

    Must be called before Megatron is imported.
    """
    first_rank = int(os.getenv("RANK", "0")) == 0
    if not first_rank:
        warnings.filterwarnings("ignore")
    import torch

    if not torch.cuda.is_available():  # once the platform is installed, it is
        from megatron_slm import cpu_platform

        if first_rank:
            print("> no CUDA device found: running on the CPU platform (gloo)", flush=True)
        for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        cpu_platform.install()


def add_arguments(parser: ArgumentParser, job: Job = TRAINING) -> ArgumentParser:
    """Add a job's options to Megatron's, with the CPU platform's defaults if it is installed."""
    from megatron_slm.training.checkpoint_arguments import take_from_checkpoint
    from megatron_slm.training.command_line.arguments import add_arguments as add_own

    add_own(parser)
    for options in job.options:
        add_group(parser, options)
    platform = sys.modules.get("megatron_slm.cpu_platform")  # a GPU machine never imports it
    if platform is not None and platform.installed():
        parser.set_defaults(**platform.ARGUMENT_DEFAULTS)
    take_from_checkpoint(parser)
    return parser
