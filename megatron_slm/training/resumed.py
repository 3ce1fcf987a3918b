"""What a resumed run has to take over from its checkpoint, beside what Megatron does.

Megatron's checkpoints keep the arguments of the run that wrote them, and so what we put there.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import get_checkpoint_name

from megatron_slm.errors import UserError


def saved_arguments(args: Namespace) -> Namespace:
    """Arguments in the checkpoint that the policy resumed from; empty if it started afresh."""
    if args.load is None or args.iteration == 0:
        return Namespace()
    directory = get_checkpoint_name(args.load, args.iteration, return_base_dir=True)
    if not Path(directory).exists():  # Megatron prefers a later one that is not for keeps
        temporary = args.non_persistent_global_ckpt_dir or Path(args.load) / "non_persistent"
        directory = get_checkpoint_name(str(temporary), args.iteration, return_base_dir=True)
    saved: Namespace = dist_checkpointing.load_common_state_dict(directory)["args"]
    return saved


def check_same_reference(args: Namespace, saved: Namespace) -> None:
    """A reference that has trained on since would silently change what the policy learns.

    Raises:
        UserError: the checkpoint was written with another iteration of the reference, and none was
            asked for.
    """
    before = getattr(saved, "slm_reference_identity", None)
    now = args.slm_reference_identity
    if args.slm_reference_ckpt_step is None and before not in (None, now):
        raise UserError(
            f"this run selected tokens by {before} of the reference so far, and now that is {now}: "
            "give the same; a checkpoint that is to take its place is named by "
            "--slm-reference-ckpt-step as well"
        )
