"""Policy and reference must read text as the same tokens."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.model.tokenizer_files import fingerprint
from megatron_slm.reference.checkpoint import ReferenceCheckpoint


def record_tokenizer(args: Namespace, tokenizer: Any) -> None:
    """Put what identifies the tokenizer into the arguments, which checkpoints carry."""
    args.slm_vocab_size = int(tokenizer.vocab_size)
    args.slm_tokenizer = fingerprint(args, tokenizer)


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
    known = getattr(saved, "slm_tokenizer", None)
    if known is not None and known != args.slm_tokenizer:
        raise UserError(
            f"{where} was trained with another tokenizer ({saved.tokenizer_type} "
            f"{saved.tokenizer_model}, fingerprint {known}) than this run's "
            f"({args.tokenizer_type} {args.tokenizer_model}, {args.slm_tokenizer}); {what_to_do}"
        )
