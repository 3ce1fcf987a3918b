"""The "selective language modeling" arguments, and what they cannot be combined with."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

from megatron_slm.errors import UserError
from megatron_slm.selection import (
    SCOPES,
    SCORES,
    WEIGHTINGS,
)

# Megatron's options that this loss cannot honour, and why.
UNSUPPORTED = {
    "mtp_num_layers": ("--mtp-num-layers", "its loss would count unselected tokens"),
    "num_experts": ("--num-experts", "the auxiliary losses would be scaled by all tokens"),
    "hybrid_context_parallel": ("--hybrid-context-parallel", "it reorders micro-batches"),
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
        nargs="+",
        metavar="[NAME=]DIR",
        help="Directory with the checkpoint (torch_dist format) of the reference model. It may "
        "have another architecture and another layout; its tokenizer must be the same. Of several "
        "the mean loss is taken, or with names of the blend's datasets each one's own.",
    )
    group.add_argument(
        "--slm-reference",
        metavar="ema:DECAY",
        help="Instead of a checkpoint: the exponential moving average of the policy's weights.",
    )
    group.add_argument(
        "--slm-reference-cache",
        nargs="+",
        metavar="DIR",
        help="Instead of a checkpoint: reference losses stored by tools/score_reference.py.",
    )
    group.add_argument(
        "--slm-reference-offload",
        action="store_true",
        help="Keep the reference's weights in host memory and bring them layer by layer.",
    )
    group.add_argument(
        "--slm-reference-micro-batch-size",
        type=int,
        metavar="N",
        help="Samples that the reference scores at a time, a multiple of --micro-batch-size. "
        "Default: --micro-batch-size.",
    )
    group.add_argument(
        "--slm-reference-fp8",
        action="store_true",
        help="Let the reference compute in fp8 (e4m3, scales of the current tensors). Needs "
        "Transformer Engine.",
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
    group.add_argument(
        "--slm-changed",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Arguments of the model, such as rotary_base, in which this run is to differ from the "
        "checkpoint that it starts from. Any other difference is an error.",
    )
    group.add_argument(
        "--slm-dump-interval",
        type=int,
        metavar="N",
        help="Every N iterations, at the start and at the end, write the losses of all tokens of a "
        "few fixed samples, for tools/report.py.",
    )
    group.add_argument(
        "--slm-dump-dir", metavar="DIR", help="Where to. Default: dump in the directory of --save."
    )
    group.add_argument(
        "--slm-dump-samples",
        type=int,
        default=8,
        metavar="N",
        help="How many samples. Default: 8.",
    )
    group.add_argument(
        "--slm-dump-train-samples",
        action="store_true",
        help="The first of the training data, as the blend mixes it, though there is validation "
        "data.",
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


def validate_arguments(args: Namespace) -> None:
    """Refuse Megatron's options that cannot be honoured.

    Args:
        args: as parsed, and again after Megatron's validation, which may set some of them.

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
    shards = args.tensor_parallel_num_weight_shards
    if shards is not None and shards != args.tensor_model_parallel_size:
        raise UserError(
            "--tensor-parallel-num-weight-shards cannot be used: the output layer's "
            "weight is gathered only when it is called"
        )
    if args.slm_dump_interval is not None:
        if args.slm_dump_interval < 1:
            raise UserError("--slm-dump-interval must be at least 1")
        if args.slm_dump_samples < 1:
            raise UserError("--slm-dump-samples must be at least 1")
        if args.slm_dump_dir is None and args.save is None:
            raise UserError("--slm-dump-interval needs --slm-dump-dir or --save to write to")
    if args.slm_reference_fp8 and not HAVE_TE:
        raise UserError("--slm-reference-fp8 needs Transformer Engine, which is not installed")
    if args.use_distributed_optimizer and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise UserError(
            "--use-distributed-optimizer needs Transformer Engine or Apex: without them Megatron "
            "saves checkpoints that it cannot resume from"
        )
