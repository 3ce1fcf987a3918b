"""Refuse options that the prediction of more tokens (--mtp-num-layers) cannot be combined with."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_slm.errors import UserError
from megatron_slm.model.documents import packs_documents


def check_predictions(args: Namespace) -> None:
    """Refuse what cannot be honoured of the options beside --mtp-num-layers.

    Args:
        args: the arguments as parsed, or after Megatron's validation.

    Raises:
        UserError: an option cannot be used; the message names it and the reason.
    """
    if not args.mtp_num_layers:
        return
    for flag, value, why in (
        (
            "--slm-scope document",
            args.slm_scope == "document",
            "how many tokens it selects is not known before the first backward pass",
        ),
        (
            "--sft and --dataloader-inter-document-masking",
            packs_documents(args),
            "a document's last tokens would be trained on the first of the next",
        ),
        (
            "--pipeline-model-parallel-layout",
            args.pipeline_model_parallel_layout,
            "the stage of these layers may then lack the tokens",
        ),
        (
            "--sequence-parallel without Transformer Engine",
            args.sequence_parallel and not HAVE_TE,
            "Megatron's plain norms of these layers refuse it",
        ),
    ):
        if value:
            raise UserError(f"--mtp-num-layers cannot be used with {flag}: {why}")
