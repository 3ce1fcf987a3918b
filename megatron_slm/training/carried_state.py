"""The carried threshold in Megatron's checkpoints, as one of the arguments they keep."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_name


def load_carried(args: Namespace) -> Any:
    """State of the threshold in the checkpoint that the policy resumed from; None if it did not."""
    if args.load is None or args.iteration == 0:
        return None
    directory = get_checkpoint_name(args.load, args.iteration, return_base_dir=True)
    saved = dist_checkpointing.load_common_state_dict(directory)["args"]
    return getattr(saved, "slm_carried_threshold", None)
