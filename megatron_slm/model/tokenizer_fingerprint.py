"""What identifies a run's tokenizer, whatever files it was built from."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from typing import Any

# Tokenized and hashed, so that runs can tell whether they read text as the same tokens.
PROBE = "Not all tokens are what you need: 3.14 + 2 = 5.14\n\tdef f(x): return {x}  # naïve 東京 🎲"


def tokenizer_fingerprint(arguments: Namespace, tokenizer: Any) -> str:
    """What identifies a tokenizer of Megatron's, built from these arguments."""
    if arguments.tokenizer_type.startswith("Null"):  # its text is numbers
        tokens = [arguments.tokenizer_type]
    else:
        tokens = list(tokenizer.tokenize(PROBE))
    content = f"{tokens} {tokenizer.vocab_size} {tokenizer.eod}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
