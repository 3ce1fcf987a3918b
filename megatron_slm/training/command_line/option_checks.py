"""Refuse options of ours that contradict each other."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection

from megatron_slm.errors import UserError
from megatron_slm.training.command_line.decisions import (
    ranks_tokens,
    reference_flags,
    weighs_tokens,
)
from megatron_slm.training.command_line.options import (
    COMPARES_WITH_REFERENCE,
    NEED_ENTROPIES,
    NEED_REFERENCE,
)


def check_options(args: Namespace, given: Collection[str]) -> None:
    """Refuse options of training that contradict each other.

    Args:
        args: values of all options.
        given: the options on the command line; the others have their defaults in `args`.

    Raises:
        UserError: two contradict each other; the message names them and what to do.
    """
    references = reference_flags(args)
    if len(references) > 1:
        raise UserError(f"{' and '.join(references)} name a reference each; give one of them")
    _check_schedule(args)
    if not references and ranks_tokens(args) and args.slm_score in NEED_REFERENCE:
        raise UserError(
            f"--slm-score {args.slm_score} with --slm-token-ratio {args.slm_token_ratio} selects "
            "tokens by the reference model's loss: give its checkpoint with --slm-reference-load"
        )
    if not references and args.slm_weighting in COMPARES_WITH_REFERENCE:
        raise UserError(
            f"--slm-weighting {args.slm_weighting} compares the policy with a reference that sees "
            "a short context: give its losses with --slm-reference-cache, or its checkpoint with "
            "--slm-reference-load"
        )
    if references and not weighs_tokens(args) and "--slm-token-ratio" not in given:
        raise UserError(
            f"{references[0]} without --slm-token-ratio would train on all tokens and pay for the "
            "reference at every step: give a ratio, such as 0.6, or --slm-token-ratio 1 to log "
            "the reference's losses alone"
        )
    check_reference(args)
    if args.slm_global_batch == "exact" and args.slm_scope != "global-batch":
        raise UserError("--slm-global-batch exact needs --slm-scope global-batch")
    for flag, name in (("--slm-score", args.slm_score), ("--slm-weighting", args.slm_weighting)):
        if args.slm_head == "dense" and name in NEED_ENTROPIES:
            raise UserError(f"{flag} {name} needs --slm-head chunked")
    soft = "--slm-weighting" if args.slm_weighting != "hard" else None
    guarded = "--slm-unselected-weight" if args.slm_unselected_weight > 0.0 else None
    if args.slm_backward == "selected" and (soft or guarded):
        raise UserError(
            f"--slm-backward selected cannot be used with {soft or guarded}: tokens that are not "
            "selected count too"
        )
    if args.slm_dump_interval is not None and args.slm_dump_dir is None and args.save is None:
        raise UserError("--slm-dump-interval needs --slm-dump-dir or --save to write to")


def _check_schedule(args: Namespace) -> None:
    kind = args.slm_ratio_schedule
    if (args.slm_final_token_ratio is not None) != (kind in ("linear", "cosine")):
        raise UserError(
            "--slm-ratio-schedule linear and cosine need --slm-final-token-ratio, the others "
            "have none"
        )
    if bool(args.slm_ratio_steps) != (kind == "steps"):
        raise UserError("--slm-ratio-schedule steps needs --slm-ratio-steps, the others have none")
    iterations = [int(step.partition(":")[0]) for step in args.slm_ratio_steps]
    if iterations != sorted(set(iterations)):
        raise UserError("--slm-ratio-steps must be in the order of their iterations")


def check_reference(args: Namespace) -> None:
    """Refuse options for a reference that do not suit the reference that is named.

    Raises:
        UserError: one does not; the message names it and what to do.
    """
    if args.slm_reference_ckpt_step is not None and len(args.slm_reference_load or []) != 1:
        raise UserError("--slm-reference-ckpt-step needs --slm-reference-load with one directory")
    online = args.slm_reference_load or args.slm_reference
    for flag, value in (
        ("--slm-reference-offload", args.slm_reference_offload),
        ("--slm-reference-micro-batch-size", args.slm_reference_micro_batch_size),
        ("--slm-reference-fp8", args.slm_reference_fp8),
    ):
        if value and not online:
            raise UserError(f"{flag} is of use to --slm-reference-load alone")
    if args.slm_reference:
        decay_of(args.slm_reference)


def decay_of(reference: str) -> float:
    """Return the decay of a moving average from its name, ema:DECAY.

    Raises:
        UserError: the name does not have that form, or the decay is not in (0, 1).
    """
    kind, _, text = reference.partition(":")
    try:
        decay = float(text)
    except ValueError:
        decay = -1.0
    if kind != "ema" or not 0.0 < decay < 1.0:
        raise UserError(f"--slm-reference {reference}: give ema:DECAY with a decay in (0, 1)")
    return decay
