"""Refuse options that a hybrid model (--hybrid-layer-pattern) cannot honour.

Megatron's HybridModel ignores some of a GPT's options without a word, so that the weights of a GPT
would compute something else in it.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_slm.errors import UserError
from megatron_slm.model.documents import packs_documents
from megatron_slm.model.hybrid_pattern import RECURRENT, check_layers, layers_of

UNSUPPORTED = {
    "mtp_num_layers": (
        "--mtp-num-layers",
        "the loss of HybridModel's predictions of more tokens is out of the selective head's reach",
    ),
    "use_rope_scaling": ("--use-rope-scaling", "Megatron's HybridModel ignores it"),
    "rotary_interleaved": (
        "--rotary-interleaved",
        "Megatron's HybridModel makes the angles for the other order of channels",
    ),
    "qk_l2_norm": ("--qk-l2-norm", "the layers of Megatron's HybridModel ignore it"),
    "fine_grained_activation_offloading": (
        "--fine-grained-activation-offloading",
        "the selective head hides the output layer from it",
    ),
}
"""By the argument's name: the flag, and the reason."""


def check_hybrid(args: Namespace) -> None:
    """Refuse what cannot be honoured of the options for hybrid models.

    Args:
        args: the arguments as parsed, or after Megatron's validation.

    Raises:
        UserError: an option cannot be used; the message names it and the reason.
    """
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    flag = f"--hybrid-layer-pattern {pattern}"
    check_layers(pattern, flag)
    layers = layers_of(pattern)
    if Symbols.MTP_SEPARATOR in pattern:
        raise UserError(f"{flag}: no layers may follow a /, as with --mtp-num-layers")
    for name, (option, why) in UNSUPPORTED.items():
        if getattr(args, name, None):
            raise UserError(f"{option} cannot be used with --hybrid-layer-pattern: {why}")
    if args.qk_layernorm and args.spec is None:
        raise UserError(
            "--qk-layernorm cannot be used with --hybrid-layer-pattern: the layers of Megatron's "
            "HybridModel ignore it; --spec may name others"
        )
    if Symbols.MOE in layers and not args.num_experts:
        raise UserError(f"{flag}: layers E need --num-experts")
    if packs_documents(args):
        for symbol, kind in RECURRENT.items():
            if symbol in layers:
                raise UserError(
                    f"{flag}: layers {symbol} ({kind}) cannot be used with --sft or "
                    "--dataloader-inter-document-masking, since a document would see the state "
                    "that the one before it left"
                )
