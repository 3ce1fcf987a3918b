"""Identify a run's tokenizer, which the reference must share, and keep its padding out of text."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.model.tokenizer_fingerprint import tokenizer_fingerprint
from megatron_slm.reference.checkpoint import ReferenceCheckpoint

IN_TEXT = ("bos", "eos", "eod", "unk")  # special tokens that a dataset may contain


def record_tokenizer(args: Namespace, tokenizer: Any) -> None:
    """Record in the arguments, which checkpoints carry, what identifies the tokenizer.

    Also makes Megatron keep its padding apart from text.
    """
    args.slm_vocab_size = int(tokenizer.vocab_size)
    args.slm_tokenizer = tokenizer_fingerprint(args, tokenizer)
    bos, eos, pad = (_id(tokenizer, name) for name in ("bos", "eod", "pad"))
    args.slm_special_ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    if pad is not None:
        _keep_padding_apart(args, tokenizer, pad)


def _id(tokenizer: Any, name: str) -> int | None:
    try:
        found = getattr(tokenizer, name)
    except Exception:  # each of Megatron's tokenizers raises its own
        return None
    return found if isinstance(found, int) and found >= 0 else None


def _keep_padding_apart(args: Namespace, tokenizer: Any, pad: int) -> None:
    """Make Megatron read a pad token that also occurs in text as text.

    Megatron's datasets replace each pad token by token 0 and mask it as a label, wherever it
    stands, unless it is the end-of-text token as well, or another of the special tokens that
    `tokenizer` lists.  Megatron's tokenizers lack that list, so it is added here.
    """
    special = {name: _id(tokenizer, name) for name in IN_TEXT}
    same = [name for name, at in special.items() if at == pad]
    tokenizer.special_tokens_dict = {
        f"{k}_token": at for k, at in special.items() if at is not None
    }
    if args.sft and "eod" in same:
        effect = "Megatron's SFT dataset masks its label, so that no answer learns to end"
    elif args.allow_ambiguous_pad_tokens and same:
        effect = "with --allow-ambiguous-pad-tokens it is fed as token 0 and its label is masked"
    elif set(same) - {"eos", "eod"}:
        effect = "it is read as text, and nothing is masked as padding"
    else:
        return
    if args.rank == 0:
        print(
            f"the tokenizer's pad token {_text(tokenizer, pad)!r} (id {pad}) is its "
            f"{' and '.join(same)} token too: {effect}; a pad token of its own (pad_token in "
            "tokenizer_config.json) keeps them apart",
            file=sys.stderr,
        )


def _text(tokenizer: Any, at: int) -> str:
    try:
        return str(tokenizer.detokenize([at], skip_special_tokens=False))
    except Exception:  # as above
        return ""


def check_tokenizer(args: Namespace, checkpoint: ReferenceCheckpoint) -> None:
    """Refuse a reference that was trained on other tokens.

    A checkpoint that our pretraining saved carries the tokenizer's fingerprint.  Of any other, only
    the size of the vocabulary can be compared.

    Raises:
        UserError: the reference has another vocabulary or tokenizer.
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
