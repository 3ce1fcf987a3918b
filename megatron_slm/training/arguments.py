"""The "selective language modeling" arguments, and what they cannot be combined with."""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser, Namespace
from typing import Any, Literal

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_slm.errors import UserError
from megatron_slm.reference.checkpoint import ReferenceCheckpoint, open_checkpoint
from megatron_slm.training.objective import SelectiveSettings

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
        help="Part of a micro-batch's tokens to train on, in (0, 1]: those whose loss exceeds the "
        "reference model's the most. 1 without a reference is causal language modeling.",
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
        "--slm-head",
        choices=("dense", "chunked"),
        help="Output layer and loss of the policy. dense: Megatron's own. chunked: losses without "
        "logits in memory, gradients of selected tokens only. Default: chunked with a reference, "
        "dense without.",
    )
    # The loss is a sum over tokens, normalised by their number over the global batch.
    defaults: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "create_attention_mask_in_dataloader": False,
    }
    if not HAVE_TE:
        defaults |= {"transformer_impl": "local", "no_persist_layer_norm": True}
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
    if not 0.0 < args.slm_token_ratio <= 1.0:
        raise UserError(f"--slm-token-ratio must be in (0, 1], not {args.slm_token_ratio}")
    if args.slm_reference_load is None:
        if args.slm_token_ratio < 1.0:
            raise UserError(
                f"--slm-token-ratio {args.slm_token_ratio} selects tokens by the reference "
                "model's loss: give its checkpoint with --slm-reference-load"
            )
        if args.slm_reference_ckpt_step is not None:
            raise UserError("--slm-reference-ckpt-step needs --slm-reference-load")
        return None
    return open_checkpoint(args.slm_reference_load, args.slm_reference_ckpt_step)


def settings_from_arguments(args: Namespace) -> SelectiveSettings:
    """What the forward step needs of the validated arguments."""
    selective = args.slm_reference_load is not None
    head: Literal["dense", "chunked"] = args.slm_head or ("chunked" if selective else "dense")
    return SelectiveSettings(token_ratio=args.slm_token_ratio, selective=selective, head=head)


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
