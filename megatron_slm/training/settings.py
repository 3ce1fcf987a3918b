"""Settings of selective training, made from the arguments once and then passed around."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.model.documents import packs_documents
from megatron_slm.selection import RatioSchedule, SelectionSettings, check_option_names
from megatron_slm.selection.top_fraction import MAX_SEGMENTS, segments
from megatron_slm.training.batch_schedule import largest_batch
from megatron_slm.training.command_line.decisions import (
    head_of,
    is_selective,
    ranks_tokens,
    reference_flags,
)
from megatron_slm.training.left_out import LeftOut, tokens_left_out

# Each dataset has three values in the log, and Megatron reduces each value by itself in every step.
MOST_REPORTED = 64


@dataclass(frozen=True)
class SelectiveSettings:
    """What a run's arguments ask for."""

    selection: SelectionSettings
    """Which tokens are selected."""
    schedule: RatioSchedule
    """Which fraction of the tokens is selected, by iteration."""
    warmup_tokens: int
    """Tokens of causal language modeling before the first selection."""
    selective: bool
    """Whether the run selects tokens at all; if not, it is causal language modeling."""
    head: Literal["dense", "chunked"]
    """How the policy's output layer and loss are computed; loss/chunked.py compares the two."""
    domains: tuple[str, ...]
    """Names of the blend's datasets; empty if there is no blend."""
    seed: int
    """Seed of random scores."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Which training tokens are left out of the loss."""

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the datasets whose selection is logged; empty if there are too many."""
        return self.domains if len(self.domains) <= MOST_REPORTED else ()


@dataclass(frozen=True)
class Step:
    """One step of training or of validation."""

    iteration: int
    """Number of the iteration, from 0."""
    training: bool
    """Whether this is a step of training, and not of validation."""
    selects: bool
    """Whether tokens are selected; not during warm-up, nor in a run that does not select."""
    ratio: float
    """The token selection ratio, in (0, 1]."""
    thresholds: Tensor | None = None
    """Thresholds carried from the steps before, float32 [sets]; None if they are not carried."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with the step's losses on this rank, where Megatron itself does not look."""


def settings_from_arguments(args: Namespace, kinds: Collection[str] = ()) -> SelectiveSettings:
    """Make the settings of a run from its arguments.

    Args:
        args: the arguments after Megatron's validation.
        kinds: the kinds of token values that the run has, external and mask.

    Raises:
        UserError: an argument names a dataset that the blend does not have, or arguments contradict
            each other.
    """
    schedule = _schedule(args)
    domains = _domains(args)
    own_ratios = _domain_ratios(args, domains)
    selective, head = is_selective(args), head_of(args)
    if head == "chunked" and args.logits_save_dir is not None:
        raise UserError(
            "--logits-save-dir needs --slm-head dense: the chunked head keeps no logits"
        )
    if selective:
        _check_scope(args, max(1, len(own_ratios)))
        # Only from these checkpoints can a resumed run read what it has to take over.
        if args.ckpt_format != "torch_dist":
            raise UserError(f"--ckpt-format {args.ckpt_format}: selection needs torch_dist")
        if args.non_persistent_ckpt_type == "local":
            raise UserError("--non-persistent-ckpt-type local: selection needs global")
    return SelectiveSettings(
        selection=_selection(args, own_ratios, head, kinds),
        schedule=schedule,
        warmup_tokens=args.slm_warmup_tokens,
        selective=selective,
        head=head,
        domains=domains if selective else (),
        seed=args.seed,
        left_out=tokens_left_out(args, kinds),
    )


def _selection(
    args: Namespace, domain_ratios: tuple[float | None, ...], head: str, kinds: Collection[str]
) -> SelectionSettings:
    """Make the settings of selection, and check that what its functions read can be had."""
    chosen = SelectionSettings(
        scope=args.slm_scope,
        exact=args.slm_global_batch == "exact",
        score=args.slm_score,
        weighting=args.slm_weighting,
        options=tuple(args.slm_score_option),
        temperature=args.slm_softmax_temperature,
        unselected_weight=args.slm_unselected_weight,
        domain_ratios=domain_ratios,
    )
    weigher, referred = chosen.weigher, bool(reference_flags(args))
    if is_selective(args):
        check_option_names(chosen.options, [chosen.scorer, weigher])
    ranked = ranks_tokens(args) or (weigher is not None and "scores" in weigher.needs)
    if not ranked and not referred:  # all tokens are selected, and this score costs nothing
        chosen = replace(chosen, score="policy")
    for function in (chosen.scorer, weigher):
        if function is None or not is_selective(args):
            continue
        needs = function.needs
        if needs & {"reference_losses", "reference_entropies"} and not referred:
            raise UserError(f"{function.called} needs --slm-reference-load, or another reference")
        if needs & {"entropies", "top_entropies"} and head == "dense":
            raise UserError(f"{function.called} needs --slm-head chunked")
        if needs & {"documents", "document_positions"} and not packs_documents(args):
            raise UserError(
                f"{function.called} needs samples whose documents do not see each other: give "
                "--dataloader-inter-document-masking, or --sft"
            )
        if "external" in needs and "external" not in kinds:
            raise UserError(
                f"{function.called} needs --slm-token-values with a cache of external values"
            )
        of_all = get_blend_and_blend_per_split(args)[0] is not None
        if "datasets" in needs and not (of_all and _domains(args)):
            raise UserError(
                f"{function.called} needs several datasets in --data-path, and --split, so that "
                "validation has the training blend's datasets"
            )
    return chosen


def _check_scope(args: Namespace, sets: int) -> None:
    """Refuse a scope so wide that ranks could not agree on its ties."""
    micro_batch = args.micro_batch_size
    scope = {
        "global-batch": largest_batch(args),
        "data-parallel": micro_batch * args.data_parallel_size,
    }
    samples, size = scope.get(args.slm_scope, micro_batch), args.context_parallel_size
    found = segments(samples, micro_batch, size, sets)
    if found > MAX_SEGMENTS:
        raise UserError(
            f"--slm-scope {args.slm_scope} has {samples} samples over {size} context-parallel "
            f"ranks, {found} segments; at most {MAX_SEGMENTS} can be ranked: take a narrower scope"
        )


def _schedule(args: Namespace) -> RatioSchedule:
    start, kind = args.slm_token_ratio, args.slm_ratio_schedule
    if kind == "constant":
        return RatioSchedule(start)
    if kind == "steps":
        steps = (step.split(":") for step in args.slm_ratio_steps)
        return RatioSchedule(start, kind, steps=tuple((int(n), float(ratio)) for n, ratio in steps))
    iterations = args.slm_ratio_decay_iters or args.train_iters
    if not iterations or iterations < 1:
        raise UserError(f"--slm-ratio-schedule {kind} needs --slm-ratio-decay-iters")
    return RatioSchedule(start, kind, args.slm_final_token_ratio, iterations)


def _domains(args: Namespace) -> tuple[str, ...]:
    """Return the names of the training blend's datasets; none if it is a single dataset."""
    blend, per_split = get_blend_and_blend_per_split(args)
    training = blend if blend is not None else (per_split or [None])[0]
    paths = [] if training is None else training[0]
    if len(paths) < 2:
        return ()
    names = tuple(Path(path).name.removesuffix("_text_document") for path in paths)
    return names if len(set(names)) == len(names) else tuple(paths)


def _domain_ratios(args: Namespace, domains: tuple[str, ...]) -> tuple[float | None, ...]:
    own = {}
    for item in args.slm_domain_ratio:
        name, _, ratio = item.rpartition("=")
        if name not in domains:
            raise UserError(
                f"--slm-domain-ratio {item}: the training blend has no dataset {name!r}, only "
                f"{', '.join(domains) or 'a single one'}"
            )
        own[name] = float(ratio)
    return tuple(own.get(name) for name in domains) if own else ()
