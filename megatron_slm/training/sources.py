"""Open the source of a run's reference losses that its arguments name:

--slm-reference-load DIR            one frozen replica
--slm-reference-load DIR DIR ...    several frozen replicas, whose losses are averaged
--slm-reference-load NAME=DIR ...   one for each dataset of the blend
--slm-reference ema:DECAY           the moving average of the policy
--slm-reference-cache DIR ...       losses that tools/score_reference.py has stored
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.training.utils import get_blend_and_blend_per_split

from megatron_slm.errors import UserError
from megatron_slm.loss import Scoring
from megatron_slm.reference import Reference
from megatron_slm.reference.checkpoint import (
    FLAGS,
    ReferenceCheckpoint,
    checkpoint_fingerprint,
    open_checkpoint,
)
from megatron_slm.reference.fp8 import check_fp8
from megatron_slm.reference.moving_average import MovingAverage
from megatron_slm.reference.online import (
    frozen_arguments,
    frozen_reference,
    reference_arguments,
)
from megatron_slm.reference.several import SeveralReferences
from megatron_slm.training.caches import Caches, open_caches
from megatron_slm.training.command_line.decisions import reference_flags
from megatron_slm.training.command_line.option_checks import decay_of
from megatron_slm.training.tokenizer import check_tokenizer


@dataclass(frozen=True)
class Source:
    """Where a run's reference losses come from."""

    build: Callable[[], Reference] | None
    """Builds the reference, once, on all ranks, when the policy has been built and loaded; None if
    the losses come with the tokens."""
    identity: str
    """What the reference of a run that resumes must have in common with this one."""
    by_domain: bool = False
    """Whether the reference has to know which dataset a sample is from."""
    caches: Caches | None = None
    """What the datasets read the losses from; None if the reference is computed."""


def open_source(
    args: Namespace,
    domains: tuple[str, ...],
    layer_spec: Callable[..., Any] | None,
    entropies: bool = False,
) -> Source | None:
    """Open the source that the arguments name, and check its files; None without a reference.

    Args:
        args: the arguments after Megatron's validation.
        domains: names of the blend's datasets.
        layer_spec: the reference's layers, as for the policy.
        entropies: whether the reference's entropies are needed as well.

    Raises:
        UserError: the source is missing, damaged, or of another tokenizer or model, or arguments
            contradict each other.
    """
    check_batches(args)
    if not reference_flags(args):
        return None
    if args.slm_reference_cache:
        if entropies:
            raise UserError(
                "--slm-reference-cache: a score cache holds losses alone, not the entropies that "
                f"--slm-score {args.slm_score} or --slm-weighting {args.slm_weighting} reads"
            )
        caches = open_caches(args)
        return Source(None, caches.identity, caches=caches)
    scoring = Scoring(
        args.slm_vocab_size,
        entropies=entropies,
        dense=args.slm_head == "dense",
    )
    if args.slm_reference:
        return _moving_average(args, scoring, layer_spec)
    return _checkpoints(args, domains, scoring, layer_spec)


def check_batches(args: Namespace) -> None:
    """Check how many samples the reference scores at once.

    Raises:
        UserError: the run's micro-batches do not divide them.
    """
    size = args.slm_reference_micro_batch_size
    if size is not None and size % args.micro_batch_size:
        raise UserError(
            f"--slm-reference-micro-batch-size {size} must be a multiple of --micro-batch-size "
            f"{args.micro_batch_size}"
        )


def _checkpoints(
    args: Namespace,
    domains: tuple[str, ...],
    scoring: Scoring,
    layer_spec: Callable[..., Any] | None,
) -> Source:
    named = _by_domain(args.slm_reference_load, domains)
    by_domain = any(name in domains for name in named)
    if by_domain and get_blend_and_blend_per_split(args)[0] is None:
        raise UserError(
            "--slm-reference-load NAME=DIR needs --data-path and --split, so that validation has "
            "the training blend's datasets"
        )
    opened = [open_reference(args, load, args.slm_reference_ckpt_step) for load in named.values()]

    def build() -> Reference:
        references = [frozen_reference(*each, scoring, layer_spec) for each in opened]
        if len(references) == 1:
            return references[0]
        numbers = [domains.index(name) for name in named] if by_domain else None
        return SeveralReferences(references, numbers)

    identity = [checkpoint_fingerprint(checkpoint) for checkpoint, _ in opened]
    return Source(build, json.dumps(identity, sort_keys=True), by_domain)


def open_reference(
    args: Namespace, load: str, step: int | None, flags: tuple[str, str] = FLAGS
) -> tuple[ReferenceCheckpoint, Namespace]:
    """Open a checkpoint, and return it with the arguments to build its model with.

    Args:
        args: the run's arguments after Megatron's validation.
        load: the checkpoint's directory.
        step: its iteration; None for the latest.
        flags: the options from which `load` and `step` come, for errors.

    Raises:
        UserError: as open_checkpoint, check_tokenizer and reference_arguments do.
    """
    checkpoint = open_checkpoint(load, step, flags)
    check_tokenizer(args, checkpoint)
    return checkpoint, reference_arguments(checkpoint, args)


def _by_domain(loads: list[str], domains: tuple[str, ...]) -> dict[str, str]:
    """Return directories by the dataset that they are for, or by themselves if they are for all."""
    pairs = [load.partition("=") for load in loads]
    if not any(name in domains and equals for name, equals, _ in pairs):
        return {load: load for load in loads}
    named = {name: load for name, _, load in pairs}
    if set(named) != set(domains) or len(named) < len(pairs):
        raise UserError(
            f"--slm-reference-load: give each dataset of the blend ({', '.join(domains)}) a "
            "reference, NAME=DIR, or none of them"
        )
    return named


def _moving_average(
    args: Namespace, scoring: Scoring, layer_spec: Callable[..., Any] | None
) -> Source:
    decay = decay_of(args.slm_reference)
    for flag, value in (
        ("--slm-reference-offload", args.slm_reference_offload),
        ("--overlap-param-gather", args.overlap_param_gather),
        ("--non-persistent-save-interval", args.non_persistent_save_interval),
        ("--spec", args.spec),
        ("multi-latent attention", args.multi_latent_attention),
        ("virtual pipeline stages", args.virtual_pipeline_model_parallel_size),
        ("--pipeline-model-parallel-layout", args.pipeline_model_parallel_layout),
        ("stages of different sizes", args.decoder_first_pipeline_num_layers is not None),
        ("stages of different sizes", args.decoder_last_pipeline_num_layers is not None),
        ("stages of different sizes", args.account_for_embedding_in_pipeline_split),
        ("stages of different sizes", args.account_for_loss_in_pipeline_split),
    ):
        if value:
            raise UserError(f"--slm-reference ema cannot be used with {flag}")
    own = frozen_arguments(args)
    check_fp8(own, "the policy, and so its average,")

    def build() -> Reference:
        resumes = args.load is not None and args.iteration > 0
        return MovingAverage(
            own,
            scoring,
            decay,
            layer_spec,
            (args.load, args.iteration) if resumes else None,
        )

    return Source(build, args.slm_reference)
