"""Parse and validate a command line as Megatron does, with our checks before Megatron's.

parse      by Megatron's parser, with our options added
check      for what we refuse; Megatron's validation would give another reason for some of it
validate   by Megatron's validation, which also fills in what the arguments leave open
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron.training.arguments import (
    parse_and_validate_args,
    parse_args,
    validate_args,
)
from megatron.training.checkpointing import load_args_from_checkpoint

from megatron_slm.errors import UserError
from megatron_slm.training.command_line.arguments import UNSUPPORTED, validate_arguments
from megatron_slm.training.command_line.combinations import (
    check_job,
    check_packages,
    check_training,
)
from megatron_slm.training.command_line.refusals import in_one_line

AddOptions = Callable[[ArgumentParser], ArgumentParser]
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}


def parse_training(add_options: AddOptions) -> Namespace:
    """Parse, check and validate a training run's arguments, and make them Megatron's own.

    Args:
        add_options: adds options to Megatron's parser, and the checks of check_when_parsed.

    Raises:
        UserError: arguments that we or Megatron refuse.
    """
    with in_one_line():
        args: Namespace = parse_and_validate_args(add_options, args_defaults=DEFAULTS)
    return args


def parse_planned(add_options: AddOptions) -> Namespace:
    """Parse, check and validate the arguments of a run that is to start elsewhere.

    Neither the packages that it needs nor its tokenizer have to be on this machine, and the
    arguments do not become Megatron's own.

    Args:
        add_options: adds options to Megatron's parser.

    Raises:
        UserError: arguments that we or Megatron refuse.
    """
    with in_one_line():
        args: Namespace = parse_args(
            lambda parser: check_when_parsed(add_options(parser), check_job, check_training)
        )
        if args.use_checkpoint_args:
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        validate_args(args, DEFAULTS)
    validate_arguments(args)
    return args


def parse_job(add_options: AddOptions) -> Namespace:
    """Parse a scoring job's arguments, and check what can be told without Megatron's validation.

    Raises:
        UserError: arguments that we or Megatron refuse.
    """
    with in_one_line():
        args: Namespace = parse_args(
            lambda parser: check_when_parsed(add_options(parser), check_job, check_packages)
        )
    return args


def check_when_parsed(
    parser: ArgumentParser, *checks: Callable[[Namespace], None]
) -> ArgumentParser:
    """Make Megatron's parser check arguments as soon as they are parsed, before Megatron does.

    Args:
        parser: Megatron's parser, with our options; changed in place and returned.
        checks: called with the arguments, after the checks that every job has.
    """
    parse = parser.parse_args

    def parse_and_check(*words: Any, **settings: Any) -> Namespace:
        args: Namespace = parse(*words, **settings)
        for check in (validate_arguments, *checks):
            check(args)
        return args

    parser.parse_args = parse_and_check  # type: ignore[method-assign,assignment]
    # Megatron would read the file right after parsing, and let it replace all arguments.
    next(action for action in parser._actions if action.dest == "yaml_cfg").type = _refuse_yaml
    return parser


def check_run(args: Namespace) -> None:
    """Check a training run's arguments as they were parsed.

    Raises:
        UserError: some are faulty or contradict each other; the message says what to do.
    """
    check_job(args)
    check_packages(args)
    check_training(args)


def _refuse_yaml(_: str) -> None:
    flag, why = UNSUPPORTED["yaml_cfg"]
    raise UserError(f"{flag} cannot be used with selective language modeling: {why}")
