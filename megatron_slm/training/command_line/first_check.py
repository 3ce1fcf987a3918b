"""Check a command line of training or scoring, and answer --help, before torch is imported.

--help shows our options and those that every run needs.  The check refuses options of ours that are
misspelt, have wrong values or contradict each other, and names all that is missing at once.
Megatron's parser and checks follow.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.parser import Parser, refuse
from megatron_slm.training.command_line.needed import (
    OF_A_RUN,
    OF_THE_DATA,
    add_needed,
    check_needed,
)
from megatron_slm.training.command_line.option_checks import check_options, check_reference
from megatron_slm.training.command_line.option_groups import add_group
from megatron_slm.training.command_line.options import (
    DynamicsOptions,
    ScoringOptions,
    SelectiveOptions,
)

HELP_MEGATRON = "--help-megatron"


@dataclass(frozen=True)
class Job:
    """A command that takes Megatron's options: pretraining, or one that scores for it."""

    usage: str
    """How the command is called, for --help."""
    about: str
    """What the command does, for --help."""
    options: tuple[type[Any], ...]
    """Dataclasses with the options that it has beside those of training."""
    check: Callable[[Namespace, Collection[str]], None]
    """Refuses a faulty command line, given its options and which of them were written out."""
    go_on: Callable[[Namespace], str]
    """Says how to continue after Ctrl-C."""


def first_check(command: Sequence[str], job: Job) -> str:
    """Check a command line as far as is possible without torch and Megatron.

    Returns:
        How to continue after Ctrl-C, for the line that Ctrl-C prints.

    Raises:
        UserError: something is wrong or missing.
        SystemExit: the command line asks for --help, which has been printed.
    """
    parser = Parser(
        usage=job.usage,
        description=f"{job.about}\n\nAll of Megatron's options: {HELP_MEGATRON}.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    if {"-h", "--help", HELP_MEGATRON} & set(command) and os.getenv("RANK", "0") != "0":
        sys.exit()  # the first rank prints it
    if HELP_MEGATRON in command:  # Megatron's parser answers it
        return ""
    groups: tuple[type[Any], ...] = (SelectiveOptions, *job.options)
    for options in groups:
        add_group(parser, options)
    add_needed(parser)
    args, rest = parser.parse_known_args(command)
    misspelt = [word for word in rest if re.match(r"--?slm", word, re.IGNORECASE)]
    if misspelt:
        refuse(parser, f"unrecognized arguments: {' '.join(misspelt)}")
    job.check(args, options_in(command))
    return job.go_on(args)


def options_in(command: Sequence[str]) -> set[str]:
    """Return the options that are written out on a command line."""
    return {word.partition("=")[0] for word in command if word.startswith("--")}


def _check_training(args: Namespace, given: Collection[str]) -> None:
    check_options(args, given)
    if "--rampup-batch-size" in given:
        raise UserError(
            "--rampup-batch-size has no effect in this Megatron, which reads it and trains with a "
            "constant batch: use --step-batch-size-schedule"
        )
    check_needed(args, given, OF_A_RUN)


def _check_scoring(args: Namespace, given: Collection[str]) -> None:
    for flag, value in (
        ("--slm-reference-load", args.slm_reference_load),
        ("--slm-reference-cache", args.slm_reference_cache),
    ):
        if len(value or []) != 1:
            raise UserError(f"{flag}: name one directory")
    check_reference(args)
    of_samples = ("global_batch_size", "length", "eval_interval") if args.by == "sample" else ()
    check_needed(args, given, (*OF_THE_DATA, *of_samples))


def _check_dynamics(args: Namespace, given: Collection[str]) -> None:
    check_needed(args, given, (*OF_THE_DATA, "load"))


def _go_on_training(args: Namespace) -> str:
    if args.save is None:
        return "nothing was saved, as there is no --save"
    if args.load == args.save:
        return f"the same command goes on from the last checkpoint in {args.save}"
    return f"--load {args.save} goes on from the last checkpoint there, if there is one"


TRAINING = Job(
    "torchrun [...] -m megatron_slm.pretrain MEGATRON'S OPTIONS [--slm-... ...]",
    "Selective Language Modeling pretraining with Megatron.",
    (),
    _check_training,
    _go_on_training,
)
SCORING = Job(
    "torchrun [...] tools/score_reference.py OPTIONS OF THE TRAINING RUN --slm-reference-load DIR\n"
    "           --slm-reference-cache CACHE [--by document] [--cache-dtype float32]\n"
    "       python tools/score_reference.py inspect CACHE [--plot FILE.svg]",
    "Store a reference's losses, so that training runs need no reference model.",
    (ScoringOptions,),
    _check_scoring,
    lambda args: "the same command goes on where this was",
)
DYNAMICS = Job(
    "torchrun [...] tools/token_dynamics.py OPTIONS OF THE TRAINING RUN --load CHECKPOINTS\n"
    "           --dynamics RUN/dynamics [--ckpt-steps 1000 2000 ...]\n"
    "       python tools/token_dynamics.py classify RUN/dump --dynamics RUN/dynamics",
    "How the loss of each validation token changes over a run's checkpoints (Rho-1, appendix B.1).",
    (DynamicsOptions,),
    _check_dynamics,
    lambda args: "the same command goes on where this was",
)
