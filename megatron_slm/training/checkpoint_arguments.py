"""What shapes a model and --use-checkpoint-args does not take over in Megatron 0.19."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from megatron_slm.model.architecture import NOT_TAKEN_BY_MEGATRON
from megatron_slm.model.torch_dist import TRACKER, TorchDistReader, iteration_directory


def take_from_checkpoint(parser: ArgumentParser) -> None:
    """Make the checkpoint's the defaults of `parser`, if the command line asks for them.

    Raises:
        UserError: a damaged checkpoint.
    """
    asked = ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--use-checkpoint-args", action="store_true")
    asked.add_argument("--load", type=Path)
    asked.add_argument("--pretrained-checkpoint", type=Path)
    asked.add_argument("--ckpt-step", type=int)
    args, _ = asked.parse_known_args()
    if not args.use_checkpoint_args:
        return
    for directory in (args.load, args.pretrained_checkpoint):
        if directory is not None and (directory / TRACKER).is_file():
            latest = iteration_directory(directory, args.ckpt_step, "--load", "--ckpt-step")
            saved = vars(TorchDistReader(latest).arguments)
            parser.set_defaults(
                **{name: saved[name] for name in NOT_TAKEN_BY_MEGATRON if name in saved}
            )
            return
