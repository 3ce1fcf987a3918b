"""What every job of ours does before anything else: look at its command line and at the machine."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable

from megatron_slm.errors import exit_on_user_error
from megatron_slm.training.first_check import TRAINING, Job, first_check
from megatron_slm.training.option_groups import add_group

# What torchrun would tell a single rank; its port is any that is free.
ONE_RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def start(job: Job, work: Callable[[bool], None], cpu: bool | None = None) -> None:
    """Check the command line, install the CPU platform where there is no GPU, and do the work, as
    one rank where nothing says which.

    Args:
        work: given whether that platform is installed, which comes before Megatron is imported.
        cpu: if that is known.
    """
    with exit_on_user_error("the same command starts again"):
        go_on = first_check(sys.argv[1:], job)
        if "RANK" not in os.environ:
            os.environ |= ONE_RANK
        with exit_on_user_error(go_on, at_once=True):
            work(use_device() if cpu is None else cpu)


def use_device() -> bool:
    """Install the CPU platform if there is no GPU; True if so.  Before Megatron is imported."""
    first_rank = int(os.getenv("RANK", "0")) == 0
    if not first_rank:
        warnings.filterwarnings("ignore")
    import torch

    cpu = not torch.cuda.is_available()
    if cpu:
        from megatron_slm import cpu_platform

        if first_rank:
            print("> no CUDA device found: running on the CPU platform (gloo)", flush=True)
        cpu_platform.install()
    return cpu


def add_arguments(parser: ArgumentParser, cpu: bool, job: Job = TRAINING) -> ArgumentParser:
    """Add a job's options, and the CPU's defaults if its platform is installed."""
    from megatron_slm.training.arguments import add_arguments as add_own
    from megatron_slm.training.checkpoint_arguments import take_from_checkpoint

    add_own(parser)
    for options in job.options:
        add_group(parser, options)
    if cpu:
        from megatron_slm import cpu_platform

        parser.set_defaults(**cpu_platform.ARGUMENT_DEFAULTS)
    take_from_checkpoint(parser)
    return parser
