"""What every job of ours does before anything else: find out whether there is a GPU."""

from __future__ import annotations

import os
import warnings
from argparse import ArgumentParser

import torch


def use_device() -> bool:
    """Install the CPU platform if there is no GPU; True if so.  Before Megatron is imported."""
    first_rank = int(os.getenv("RANK", "0")) == 0
    if not first_rank:
        warnings.filterwarnings("ignore")
    cpu = not torch.cuda.is_available()
    if cpu:
        from megatron_slm import platform

        if first_rank:
            print("> no CUDA device found: running on the CPU platform (gloo)", flush=True)
        platform.install()
    return cpu


def add_arguments(parser: ArgumentParser, cpu: bool) -> ArgumentParser:
    """Our arguments, and the CPU's defaults if its platform is installed."""
    from megatron_slm.training.arguments import add_arguments as add_own
    from megatron_slm.training.checkpoint_arguments import take_from_checkpoint

    add_own(parser)
    if cpu:
        from megatron_slm import platform

        parser.set_defaults(**platform.ARGUMENT_DEFAULTS)
    take_from_checkpoint(parser)
    return parser
