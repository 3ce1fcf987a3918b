"""The "selective language modeling" arguments, and what they cannot be combined with."""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Literal

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_slm.errors import UserError
from megatron_slm.reference.checkpoint import ReferenceCheckpoint, open_checkpoint
from megatron_slm.selection import (
    NEED_REFERENCE,
    SCOPES,
    SCORES,
    WEIGHTINGS,
    RatioSchedule,
    SelectionSettings,
)
from megatron_slm.training.settings import SelectiveSettings

# Tokenized and hashed, so that runs can tell whether they read text as the same tokens.
PROBE = "Not all tokens are what you need: 3.14 + 2 = 5.14\n\tdef f(x): return {x}  # naïve 東京 🎲"

# Megatron's options that this loss cannot honour, and why.
UNSUPPORTED = {
    "mtp_num_layers": ("--mtp-num-layers", "its loss would count unselected tokens"),
    "num_experts": ("--num-experts", "the auxiliary losses would be scaled by all tokens"),
    "hybrid_context_parallel": ("--hybrid-context-parallel", "it reorders micro-batches"),
    "sft": ("--sft", "packed sequences are not supported"),
    "dataloader_inter_document_masking": (
        "--dataloader-inter-document-masking",
        "packed sequences are not supported",
    ),
    "reset_attention_mask": ("--reset-attention-mask", "attention is causal over the sequence"),
    "create_attention_mask_in_dataloader": (
        "--create-attention-mask-in-dataloader",
        "attention is causal and needs no mask",
    ),
    "fim_data": ("--fim-data", "only GPT datasets are supported"),
    "defer_embedding_wgrad_compute": (
        "--defer-embedding-wgrad-compute",
        "it needs the dense output layer",
    ),
    "overlap_moe_expert_parallel_comm": (
        "--overlap-moe-expert-parallel-comm",
        "it replaces the forward step",
    ),
    "perform_rl_step": ("--perform-rl-step", "it replaces the loss"),
    "logits_load_dir": ("--logits-load-dir", "it replaces the loss"),
    "modelopt_enabled": ("--modelopt-enabled", "it replaces the loss"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "the output layer's weight is gathered on call"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "the output layer's weight is gathered on call"),
    "hybrid_layer_pattern": ("--hybrid-layer-pattern", "only GPT models are supported"),
    "fp8_output_proj": ("--fp8-output-proj", "the loss needs the output layer's plain weight"),
    "inprocess_restart": ("--inprocess-restart", "the reference would outlive its process groups"),
    "yaml_cfg": ("--yaml-cfg", "give arguments on the command line"),
}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Megatron's `extra_args_provider`."""
    group = parser.add_argument_group("selective language modeling")
    group.add_argument(
        "--slm-token-ratio",
        type=float,
        default=1.0,
        metavar="K",
        help="Part of the tokens to train on, in (0, 1]: those with the highest scores. 1 without "
        "a reference is causal language modeling.",
    )
    group.add_argument(
        "--slm-reference-load",
        metavar="DIR",
        help="Directory with the checkpoint (torch_dist format) of the reference model. It may "
        "have another architecture and another layout; its tokenizer must be the same.",
    )
    group.add_argument(
        "--slm-reference-ckpt-step",
        type=int,
        metavar="N",
        help="Iteration of the reference checkpoint. Default: the latest.",
    )
    group.add_argument(
        "--slm-score",
        choices=SCORES,
        default="excess",
        help="What tokens are ranked by, highest first. excess: policy loss minus reference loss. "
        "lowest: the inverse, a control. reference, reference-entropy: low reference loss or "
        "entropy. policy, policy-entropy: high policy loss or entropy. random: a control. Only "
        "the first four need a reference. Default: excess.",
    )
    group.add_argument(
        "--slm-scope",
        choices=SCOPES,
        default="micro-batch",
        help="Tokens that compete for selection: of one sequence, one micro-batch, the "
        "micro-batches of all data-parallel ranks at a time, or the global batch. "
        "Default: micro-batch.",
    )
    group.add_argument(
        "--slm-global-batch",
        choices=("carried", "exact"),
        default="carried",
        help="With --slm-scope global-batch. carried: a threshold that follows the last steps. "
        "exact: a forward pass ranks all tokens of the step first. Default: carried.",
    )
    group.add_argument(
        "--slm-ratio-schedule",
        choices=("constant", "linear", "cosine", "steps"),
        default="constant",
        help="How --slm-token-ratio changes over iterations. Default: constant.",
    )
    group.add_argument(
        "--slm-final-token-ratio",
        type=float,
        metavar="K",
        help="Where a linear or cosine schedule ends.",
    )
    group.add_argument(
        "--slm-ratio-decay-iters",
        type=int,
        metavar="N",
        help="Iterations that a linear or cosine schedule takes. Default: --train-iters.",
    )
    group.add_argument(
        "--slm-ratio-steps",
        nargs="+",
        default=[],
        metavar="N:K",
        help="For schedule steps: from iteration N on the ratio is K, for example 1000:0.7.",
    )
    group.add_argument(
        "--slm-warmup-tokens",
        type=int,
        default=0,
        metavar="N",
        help="Tokens of causal language modeling before the first selection. Default: 0.",
    )
    group.add_argument(
        "--slm-weighting",
        choices=WEIGHTINGS,
        default="hard",
        help="hard: selected tokens count equally, others not at all. relu, softmax: all tokens "
        "count, in proportion to max(score, 0) or exp(score / temperature), and the weights add "
        "up to the number hard selection would select. Default: hard.",
    )
    group.add_argument(
        "--slm-softmax-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="In nats, for excess scores. Default: 1.",
    )
    group.add_argument(
        "--slm-unselected-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="Add W times the mean loss of unselected tokens. Default: 0.",
    )
    group.add_argument(
        "--slm-domain-ratio",
        nargs="+",
        default=[],
        metavar="NAME=K",
        help="Own ratios for datasets of the blend, by the name of their files (without "
        "directory and _text_document); their tokens compete among themselves.",
    )
    group.add_argument(
        "--slm-head",
        choices=("dense", "chunked"),
        help="Output layer and loss of the policy. dense: Megatron's own. chunked: losses without "
        "logits in memory, gradients of selected tokens only. Default: chunked when tokens are "
        "selected, else dense.",
    )
    # The loss is a sum over tokens, normalised by their number over the global batch.
    defaults: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "create_attention_mask_in_dataloader": False,
        # True by Megatron's default, which is an error where Apex is absent.
        "gradient_accumulation_fusion": _grad_accum_fusion_available,
    }
    if not HAVE_TE:
        defaults |= {
            "transformer_impl": "local",
            "no_persist_layer_norm": True,
            "apply_rope_fusion": False,
        }
    parser.set_defaults(**defaults)
    # One of Megatron's help texts has a bare per cent sign, over which --help stumbles.
    for action in parser._actions:
        if action.help is not None:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def validate_arguments(args: Namespace) -> ReferenceCheckpoint | None:
    """Check everything that can be checked before distributed initialisation.

    Raises:
        UserError: naming the argument and what to do about it.
    """
    for name, (flag, why) in UNSUPPORTED.items():
        if getattr(args, name, None):
            raise UserError(f"{flag} cannot be used with selective language modeling: {why}")
    if args.cuda_graph_impl != "none":
        raise UserError(
            f"--cuda-graph-impl {args.cuda_graph_impl} cannot be used with selective language "
            "modeling: the number of selected tokens is not static"
        )
    if args.gtp_weight_remat_size > 1:
        raise UserError(
            "--tensor-parallel-num-weight-shards cannot be used: the output layer's "
            "weight is gathered only when it is called"
        )
    if args.use_distributed_optimizer and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise UserError(
            "--use-distributed-optimizer needs Transformer Engine or Apex: without them Megatron "
            "saves checkpoints that it cannot resume from"
        )
    settings_from_arguments(args)  # raises what is wrong with the group's own arguments
    if args.slm_reference_load is None:
        if args.slm_reference_ckpt_step is not None:
            raise UserError("--slm-reference-ckpt-step needs --slm-reference-load")
        return None
    checkpoint = open_checkpoint(args.slm_reference_load, args.slm_reference_ckpt_step)
    args.slm_reference_iteration = checkpoint.directory.name
    return checkpoint


def settings_from_arguments(args: Namespace) -> SelectiveSettings:
    """What the rest of training needs of the arguments.

    Raises:
        UserError: a value out of range, or arguments that contradict each other.
    """
    schedule = _schedule(args)
    has_reference = args.slm_reference_load is not None
    domains = _domains(args)
    own_ratios = _domain_ratios(args, domains)
    whole = schedule == RatioSchedule(1.0) and not own_ratios and args.slm_weighting == "hard"
    selective = has_reference or not whole
    if selective and not has_reference and args.slm_score in NEED_REFERENCE:
        raise UserError(
            f"--slm-score {args.slm_score} with --slm-token-ratio {args.slm_token_ratio} selects "
            "tokens by the reference model's loss: give its checkpoint with --slm-reference-load"
        )
    for name, least in (("warmup_tokens", 0), ("unselected_weight", 0.0)):
        if getattr(args, f"slm_{name}") < least:
            raise UserError(f"--slm-{name.replace('_', '-')} must not be negative")
    if args.slm_softmax_temperature <= 0.0:
        raise UserError("--slm-softmax-temperature must be above 0")
    if args.slm_global_batch == "exact" and args.slm_scope != "global-batch":
        raise UserError("--slm-global-batch exact needs --slm-scope global-batch")
    head: Literal["dense", "chunked"] = args.slm_head or ("chunked" if selective else "dense")
    if head == "dense" and args.slm_score == "policy-entropy":
        raise UserError("--slm-score policy-entropy needs --slm-head chunked")
    return SelectiveSettings(
        selection=SelectionSettings(
            scope=args.slm_scope,
            exact=args.slm_global_batch == "exact",
            score=args.slm_score,
            weighting=args.slm_weighting,
            temperature=args.slm_softmax_temperature,
            unselected_weight=args.slm_unselected_weight,
            domain_ratios=own_ratios,
        ),
        schedule=schedule,
        warmup_tokens=args.slm_warmup_tokens,
        selective=selective,
        has_reference=has_reference,
        head=head,
        domains=domains if selective else (),
        seed=args.seed,
    )


def _ratio(text: str | float, flag: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        raise UserError(f"{flag}: {text!r} is not a number") from None
    if not 0.0 < ratio <= 1.0:
        raise UserError(f"{flag} must be in (0, 1], not {ratio}")
    return ratio


def _schedule(args: Namespace) -> RatioSchedule:
    start = _ratio(args.slm_token_ratio, "--slm-token-ratio")
    kind = args.slm_ratio_schedule
    if (args.slm_final_token_ratio is not None) != (kind in ("linear", "cosine")):
        raise UserError(
            "--slm-ratio-schedule linear and cosine need --slm-final-token-ratio, the others "
            "have none"
        )
    if bool(args.slm_ratio_steps) != (kind == "steps"):
        raise UserError("--slm-ratio-schedule steps needs --slm-ratio-steps, the others have none")
    if kind == "constant":
        return RatioSchedule(start)
    if kind == "steps":
        steps = []
        for step in args.slm_ratio_steps:
            iteration, _, ratio = step.partition(":")
            if not iteration.isdigit():
                raise UserError(f"--slm-ratio-steps {step}: give iteration:ratio, as in 1000:0.7")
            steps.append((int(iteration), _ratio(ratio, "--slm-ratio-steps")))
        if steps != sorted(set(steps)):
            raise UserError("--slm-ratio-steps must be in the order of their iterations")
        return RatioSchedule(start, kind, steps=tuple(steps))
    end = _ratio(args.slm_final_token_ratio, "--slm-final-token-ratio")
    iterations = args.slm_ratio_decay_iters or args.train_iters
    if not iterations or iterations < 1:
        raise UserError(f"--slm-ratio-schedule {kind} needs --slm-ratio-decay-iters")
    return RatioSchedule(start, kind, end, iterations)


def _domains(args: Namespace) -> tuple[str, ...]:
    """Names of the training blend's datasets; none where it is a single dataset."""
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
        own[name] = _ratio(ratio, "--slm-domain-ratio")
    return tuple(own.get(name) for name in domains) if own else ()


def record_tokenizer(args: Namespace, tokenizer: Any) -> None:
    """Put what identifies the tokenizer into the arguments, which checkpoints carry."""
    args.slm_vocab_size = int(tokenizer.vocab_size)
    args.slm_tokenizer = _fingerprint(args, tokenizer)


def check_tokenizer(args: Namespace, checkpoint: ReferenceCheckpoint) -> None:
    """The reference must have been trained on the same tokens.

    A checkpoint saved by this entry carries the tokenizer's fingerprint; for any other the
    vocabulary must fit, which is all that can be told.

    Raises:
        UserError: another vocabulary or tokenizer.
    """
    saved = checkpoint.arguments
    where = f"the reference in {checkpoint.directory}"
    what_to_do = "use a reference trained with this run's tokenizer"
    vocabulary = getattr(saved, "slm_vocab_size", None)
    if vocabulary is not None and vocabulary != args.slm_vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {vocabulary} tokens, this run's tokenizer "
            f"{args.slm_vocab_size}; {what_to_do}"
        )
    if saved.padded_vocab_size < args.slm_vocab_size:
        raise UserError(
            f"{where} has a vocabulary of {saved.padded_vocab_size} tokens with padding, this "
            f"run's tokenizer {args.slm_vocab_size}; {what_to_do}"
        )
    fingerprint = getattr(saved, "slm_tokenizer", None)
    if fingerprint is not None and fingerprint != args.slm_tokenizer:
        raise UserError(
            f"{where} was trained with another tokenizer ({saved.tokenizer_type} "
            f"{saved.tokenizer_model}, fingerprint {fingerprint}) than this run's "
            f"({args.tokenizer_type} {args.tokenizer_model}, {args.slm_tokenizer}); {what_to_do}"
        )


def _fingerprint(args: Namespace, tokenizer: Any) -> str:
    if args.tokenizer_type.startswith("Null"):  # its text is numbers
        tokens = [args.tokenizer_type]
    else:
        tokens = list(tokenizer.tokenize(PROBE))
    content = f"{tokens} {tokenizer.vocab_size} {tokenizer.eod}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
