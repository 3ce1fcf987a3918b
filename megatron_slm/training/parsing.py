"""Parse and validate a command line as Megatron does, with our checks before Megatron's.

parse      by Megatron's parser, with our options added
check      for what we refuse; Megatron's validation would give another reason for some of it
validate   by Megatron's validation, which also fills in what the arguments leave open
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

from megatron_slm.errors import UserError
from megatron_slm.training.arguments import UNSUPPORTED, validate_arguments
from megatron_slm.training.combinations import check_job, check_packages, check_training
from megatron_slm.training.refusals import in_one_line

AddOptions = Callable[[ArgumentParser], ArgumentParser]
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}


def parse_training(add_options: AddOptions, *, planned: bool = False) -> Namespace:
    """Parse and validate a training run's command line, as Megatron's parse_and_validate_args does.

    Args:
        planned: the run is to start elsewhere.  Neither the packages that it needs nor its
            tokenizer have to be here, and Megatron's global variables are not set.

    Raises:
        UserError: arguments that we or Megatron refuse.
    """
    args = parse_job(add_options, planned=planned)
    check_training(args)
    with in_one_line():
        if args.use_checkpoint_args:
            if args.load is None and args.pretrained_checkpoint is None:
                raise UserError("--use-checkpoint-args needs --load or --pretrained-checkpoint")
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        validate_args(args, DEFAULTS)
        if not planned:
            set_global_variables(args)
    return args


def parse_job(add_options: AddOptions, *, planned: bool = False) -> Namespace:
    """Parse a command line, and check all that can be told without Megatron's validation.

    Args:
        planned: as for parse_training.

    Raises:
        UserError: arguments that we or Megatron refuse.
    """
    with in_one_line():
        args: Namespace = parse_args(lambda parser: _without_yaml(add_options(parser)))
    validate_arguments(args)
    check_job(args)
    if not planned:
        check_packages(args)
    return args


def _without_yaml(parser: ArgumentParser) -> ArgumentParser:
    """Refuse --yaml-cfg while it is parsed: Megatron would read the file right after parsing, and
    let it replace all arguments."""

    def refuse(_: str) -> None:
        flag, why = UNSUPPORTED["yaml_cfg"]
        raise UserError(f"{flag} cannot be used with selective language modeling: {why}")

    next(action for action in parser._actions if action.dest == "yaml_cfg").type = refuse
    return parser
