"""Find the options on a command line that have no effect beside the others.

A run prints a line for each and goes on, since such an option changes nothing that is computed.
Options that would waste time or train another model than the user asked for are refused instead
(option_checks.py, arguments.py).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection

from megatron_slm.training.command_line.decisions import (
    may_need_reference,
    ranks_tokens,
    reference_flags,
    weighs_tokens,
)


def without_effect(
    args: Namespace, given: Collection[str], transformer_engine: bool, head: str
) -> list[str]:
    """Return a line for each option on the command line that has no effect.

    Args:
        args: the arguments after Megatron's validation.
        given: the options on the command line.
        transformer_engine: whether Transformer Engine is installed.
        head: the policy's head, dense or chunked.
    """
    ours = [(flag, why) for flag, idle, why in _ours(args) if idle and flag in given]
    return [
        f"note: {flag} has no effect: {why}"
        for flag, why in (*ours, *_megatrons(args, given, transformer_engine, head))
    ]


def _ours(args: Namespace) -> list[tuple[str, bool, str]]:
    """Return each option of ours with whether it is idle, and why it would be."""
    selecting, all_alike = weighs_tokens(args), "all tokens are trained on alike"
    no_dumps = args.slm_dump_interval is None, "there is no --slm-dump-interval"
    unranked = (
        not may_need_reference(args),
        f"--slm-score {args.slm_score} ranks without it; its losses are logged, at the cost of its "
        "pass",
    )
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    return [
        *(
            (flag, not selecting, all_alike)
            for flag in ("--slm-scope", "--slm-unselected-weight", "--slm-score-option")
        ),
        (
            "--slm-score",
            not ranks_tokens(args) and ":" not in args.slm_weighting,
            "all tokens are selected" if selecting else all_alike,
        ),
        ("--slm-warmup-tokens", not selecting, all_alike),
        (
            "--slm-token-ratio",
            0 < samples * args.seq_length <= args.slm_warmup_tokens,
            "--slm-warmup-tokens lasts as long as the run",
        ),
        (
            "--slm-global-batch",
            args.slm_scope != "global-batch",
            "it is for --slm-scope global-batch",
        ),
        (
            "--slm-softmax-temperature",
            args.slm_weighting != "softmax",
            "it is for --slm-weighting softmax",
        ),
        (
            "--slm-ratio-decay-iters",
            args.slm_ratio_schedule not in ("linear", "cosine"),
            "it is for --slm-ratio-schedule linear and cosine",
        ),
        ("--slm-changed", not (args.load or args.pretrained_checkpoint), "there is no --load"),
        *(
            (flag, *no_dumps)
            for flag in ("--slm-dump-dir", "--slm-dump-samples", "--slm-dump-train-samples")
        ),
        *(
            (flag, bool(selecting and reference_flags(args) and unranked[0]), unranked[1])
            for flag in ("--slm-reference-load", "--slm-reference", "--slm-reference-cache")
        ),
    ]


def _megatrons(
    args: Namespace, given: Collection[str], transformer_engine: bool, head: str
) -> list[tuple[str, str]]:
    """Return each option of Megatron's that is idle, and why it is."""
    found = []
    if "--use-flash-attn" in given:
        found.append(("--use-flash-attn", "Megatron 0.19 goes by --attention-backend"))
    if head == "chunked":
        found += [
            (flag, "the chunked head (--slm-head) computes the losses itself")
            for flag in ("--cross-entropy-loss-fusion", "--fp16-lm-cross-entropy")
            if flag in given
        ]
    if transformer_engine:
        return found
    backend = getattr(args.attention_backend, "name", args.attention_backend)
    return found + [
        (flag, "Transformer Engine is not installed, and layers are of plain torch")
        for flag, idle in (
            ("--transformer-impl", args.transformer_impl == "transformer_engine"),
            ("--attention-backend", backend in ("flash", "fused")),
            ("--cp-comm-type", args.cp_comm_type != ["p2p"]),
            ("--te-rng-tracker", True),
        )
        if idle and flag in given
    ]
