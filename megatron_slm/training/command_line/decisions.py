"""What a command line amounts to: whether a run selects tokens, and with which head it computes.

Training, its checks and planning all ask here, so that what is planned and said of a run is what
the run does.  `args` are the arguments as parsed, or as a checkpoint has them.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Literal

from megatron_slm.training.command_line.options import COMPARES_WITH_REFERENCE as COMPARES
from megatron_slm.training.command_line.options import NEED_REFERENCE, OF_SCORES


def reference_flags(args: Namespace) -> list[str]:
    """Return the options that name a reference, of which a run takes one."""
    names = ("slm_reference_load", "slm_reference", "slm_reference_cache")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def weighs_tokens(args: Namespace) -> bool:
    """Return whether some tokens are to count more than others, warm-up aside."""
    return bool(
        args.slm_token_ratio != 1.0
        or args.slm_ratio_schedule != "constant"
        or args.slm_weighting != "hard"
        or args.slm_domain_ratio
    )


def ranks_tokens(args: Namespace) -> bool:
    """Return whether it matters which tokens score highest, as far as the names of the arguments
    tell: a weighting of the user's own may read scores too."""
    return bool(
        args.slm_token_ratio != 1.0
        or args.slm_ratio_schedule != "constant"
        or args.slm_weighting in OF_SCORES
        or args.slm_domain_ratio
    )


def may_need_reference(args: Namespace) -> bool:
    """Return whether the score or the weighting needs a reference, or is the user's own."""
    names = (args.slm_score, args.slm_weighting)
    return any(":" in name or name in (*NEED_REFERENCE, *COMPARES) for name in names)


def is_selective(args: Namespace) -> bool:
    """Return whether the run selects tokens; if not, it is causal language modeling.

    A run at a ratio of 1 with a reference selects all of them, and logs the reference's losses.
    """
    return weighs_tokens(args) or bool(reference_flags(args))


def head_of(args: Namespace) -> Literal["dense", "chunked"]:
    """Return how the run computes the policy's output layer and loss: loss/chunked.py compares the
    two heads."""
    return args.slm_head or ("chunked" if is_selective(args) else "dense")
