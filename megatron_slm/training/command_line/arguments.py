"""Add our arguments to Megatron's, and refuse those that cannot be combined with them."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

from megatron_slm.errors import UserError
from megatron_slm.model.documents import packs_documents, takes_one_sequence
from megatron_slm.parser import refuse
from megatron_slm.training.command_line.backward import check_backward
from megatron_slm.training.command_line.experts import check_experts
from megatron_slm.training.command_line.first_check import HELP_MEGATRON
from megatron_slm.training.command_line.hybrid import check_hybrid
from megatron_slm.training.command_line.multi_token import check_predictions
from megatron_slm.training.command_line.option_groups import add_group
from megatron_slm.training.command_line.options import SelectiveOptions

# Options of Megatron's that selective language modeling cannot honour: the flag, and the reason.
UNSUPPORTED = {
    "hybrid_context_parallel": ("--hybrid-context-parallel", "it reorders micro-batches"),
    "reset_attention_mask": (
        "--reset-attention-mask",
        "no layer is given a mask; --dataloader-inter-document-masking keeps documents apart",
    ),
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
        "its passes, of half layers in 16 bits, have not been shown to train on the same tokens",
    ),
    "perform_rl_step": ("--perform-rl-step", "it replaces the loss"),
    "logits_load_dir": ("--logits-load-dir", "it replaces the loss"),
    "modelopt_enabled": ("--modelopt-enabled", "it replaces the loss"),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "the output layer's weight is gathered on call"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "the output layer's weight is gathered on call"),
    "fp8_output_proj": ("--fp8-output-proj", "the loss needs the output layer's plain weight"),
    "inprocess_restart": ("--inprocess-restart", "the reference would outlive its process groups"),
    "yaml_cfg": ("--yaml-cfg", "give arguments on the command line"),
}

OF_PLAIN_LAYERS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
}
"""Values of Megatron's options without Transformer Engine."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our options and defaults to Megatron's parser, whose errors become one line."""
    parser.add_argument(HELP_MEGATRON, action="help", help="Show all of these options.")
    parser.error = partial(refuse, parser)  # type: ignore[method-assign]
    add_group(parser, SelectiveOptions)
    # The loss is a sum over tokens, normalised by their number over the global batch.
    defaults: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "create_attention_mask_in_dataloader": False,
        # True by Megatron's default, which is an error where Apex is absent.
        "gradient_accumulation_fusion": _grad_accum_fusion_available,
    }
    if not HAVE_TE:
        defaults |= OF_PLAIN_LAYERS
    parser.set_defaults(**defaults)
    # One of Megatron's help texts contains a bare per cent sign, on which --help would fail.
    for action in parser._actions:
        if action.help is not None:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def validate_arguments(args: Namespace) -> None:
    """Refuse Megatron's options that cannot be honoured.

    Args:
        args: the arguments as parsed.  Check them again after Megatron's validation, which may set
            some of these options itself.

    Raises:
        UserError: one of them is set; the message names it and the reason.
    """
    for name, (flag, why) in UNSUPPORTED.items():
        if getattr(args, name, None):
            raise UserError(f"{flag} cannot be used with selective language modeling: {why}")
    check_experts(args)
    check_hybrid(args)
    check_predictions(args)
    check_backward(args)
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
    _check_documents(args)
    for flag, value in (
        ("--slm-reference-fp8", args.slm_reference_fp8),
        ("--fp8-format", args.fp8),
    ):
        if value and not HAVE_TE:
            raise UserError(f"{flag} needs Transformer Engine, which is not installed")
    if args.fp8 and args.fp8_recipe == "delayed" and args.slm_dump_interval is not None:
        raise UserError(
            "--slm-dump-interval cannot be used with --fp8-format and --fp8-recipe delayed: the "
            "dump's pass would change the scales that training goes by; take --fp8-recipe "
            "tensorwise, or leave --slm-dump-interval out"
        )
    for flag, first in (
        ("--slm-dump-interval", args.slm_dump_interval is not None),
        ("--slm-global-batch exact", args.slm_global_batch == "exact"),
    ):
        if args.fine_grained_activation_offloading and first:
            raise UserError(
                f"--fine-grained-activation-offloading cannot be used with {flag}: Megatron learns "
                "from the first pass what to offload, and that would be one without a backward pass"
            )
    if args.use_distributed_optimizer and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise UserError(
            "--use-distributed-optimizer needs Transformer Engine or Apex: without them Megatron "
            "saves checkpoints that it cannot resume from"
        )


def _check_documents(args: Namespace) -> None:
    """Refuse options about packed documents that would do nothing, or what Megatron gets wrong."""
    masks = args.dataloader_inter_document_masking
    if args.reset_position_ids and args.sft:
        raise UserError("--reset-position-ids: the positions of --sft begin anew in any case")
    if args.reset_position_ids and not masks and args.position_embedding_type != "learned_absolute":
        raise UserError(
            "--reset-position-ids does not reach --position-embedding-type "
            f"{args.position_embedding_type}, which goes by the place in the sample: leave it out, "
            "or take --dataloader-inter-document-masking, with which positions begin anew"
        )
    if masks and not args.sft and args.context_parallel_size > 1 and takes_one_sequence(args):
        raise UserError(
            "--dataloader-inter-document-masking cannot be used with --context-parallel-size "
            f"{args.context_parallel_size} and Transformer Engine: Megatron would cut samples over "
            "the ranks as wholes, but take positions and attention as if each document had been "
            "cut by itself: leave one of them out"
        )
    if args.slm_scope == "document" and not packs_documents(args):
        raise UserError(
            "--slm-scope document needs documents that do not see each other: give "
            "--dataloader-inter-document-masking, or --sft for conversations"
        )
