"""Refuse options of Megatron's that --slm-backward selected cannot be combined with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron_slm.errors import UserError
from megatron_slm.model.documents import has_plain_layers


def check_backward(args: Namespace) -> None:
    """Refuse options that a backward pass through the selected tokens alone cannot honour.

    Args:
        args: the arguments as parsed, or after Megatron's validation.

    Raises:
        UserError: there is one; the message names it and what to do.
    """
    if args.slm_backward == "selected":
        for why in _reasons(args):
            raise UserError(f"--slm-backward selected {why}")


def _reasons(args: Namespace) -> Iterator[str]:
    if not has_plain_layers(args):
        yield (
            "needs the layers of plain torch: leave it out, or give --spec "
            "megatron_slm.model.layer_spec plain_block_spec, without Transformer Engine's kernels"
        )
    if args.hybrid_layer_pattern or args.mtp_num_layers:
        flag = "--hybrid-layer-pattern" if args.hybrid_layer_pattern else "--mtp-num-layers"
        yield f"cannot be used with {flag}: only the layers of a plain GPT can do it"
    if args.num_experts:
        yield "cannot be used with --num-experts: routers balance all tokens"
    if args.attention_dropout or args.hidden_dropout:
        yield (
            "needs --attention-dropout 0 and --hidden-dropout 0: what was dropped is not known "
            "in the backward pass"
        )
    if args.recompute_granularity == "selective":
        yield (
            "cannot be used with --recompute-granularity selective: it computes attention anew in "
            "any case; take full, which keeps least, or leave it out"
        )
    if args.recompute_granularity == "full" and (
        args.recompute_method != "uniform" or args.recompute_num_layers != 1
    ):
        yield "needs --recompute-method uniform and --recompute-num-layers 1 for recomputation"
    for flag, value in (
        ("--distribute-saved-activations", args.distribute_saved_activations),
        ("--cpu-offloading-num-layers", args.cpu_offloading_num_layers),
        ("--fine-grained-activation-offloading", args.fine_grained_activation_offloading),
        ("--mlp-chunks-for-training", args.mlp_chunks_for_training > 1),
    ):
        if value:
            yield f"cannot be used with {flag}: it keeps other activations than that expects"
