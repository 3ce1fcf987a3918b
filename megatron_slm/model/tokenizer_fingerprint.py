"""Identify a run's tokenizer by what it does, whatever files it was built from."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from typing import Any

# This text is tokenized and hashed, so that runs can tell whether their tokenizers agree.
PROBE = "Not all tokens are what you need: 3.14 + 2 = 5.14\n\tdef f(x): return {x}  # naïve 東京 🎲"


def tokenizer_fingerprint(arguments: Namespace, tokenizer: Any) -> str:
    """Return a hash that identifies a tokenizer.

    Args:
        arguments: Megatron's arguments that the tokenizer was built from.
        tokenizer: Megatron's tokenizer.
    """
    if arguments.tokenizer_type.startswith("Null"):  # such a tokenizer reads numbers, not text
        tokens = [arguments.tokenizer_type]
    else:
        tokens = list(tokenizer.tokenize(PROBE))
    content = f"{tokens} {tokenizer.vocab_size} {tokenizer.eod}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
