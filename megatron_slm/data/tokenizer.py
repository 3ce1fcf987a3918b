"""Tokenizer files: sentencepiece .model, Hugging Face tokenizer.json or directory, Mistral tekken.

The file's bytes go to the workers, which need nothing else, and their hash identifies the tokenizer
in manifests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.files import read_bounded

MOST_BYTES = 1 << 28

# Megatron's names for the kinds that it has.
TYPES = {
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "hugging-face",
}


@dataclass(frozen=True)
class TokenizerFile:
    """content: what engines read.  bos, eod: ids, None if the tokenizer has none.
    special_tokens: that text may contain literally."""

    path: str
    kind: str
    content: bytes
    vocab_size: int
    bos: int | None
    eod: int | None
    special_tokens: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def open_tokenizer(path: str, megatron_type: str | None = None) -> TokenizerFile:
    """Read a tokenizer, whose kind is told from the file unless its Megatron type is given.

    Raises:
        UserError: no such file, or not a tokenizer of that kind.
    """
    where = Path(path)
    try:
        found = _open_directory(where) if where.is_dir() else _open_file(where)
    except OSError as error:
        raise UserError(f"--tokenizer-model {path}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # every tokenizer library has its own
        raise UserError(
            f"--tokenizer-model {path} is no tokenizer that can be read: "
            f"{error or type(error).__name__}"
        ) from error
    if megatron_type is not None and TYPES[megatron_type] != found.kind:
        raise UserError(f"--tokenizer-type {megatron_type}, but {path} is a {found.kind} tokenizer")
    return found


def _open_file(path: Path) -> TokenizerFile:
    try:
        content = read_bounded(path, MOST_BYTES)
    except UserError as error:
        raise UserError(f"--tokenizer-model {path}: {error}") from error
    if not content.lstrip().startswith(b"{"):
        return _sentencepiece(path, content)
    definition = json.loads(content)
    if "model" in definition:
        config = path.with_name("tokenizer_config.json")
        return _hugging_face(
            path, content, json.loads(config.read_text()) if config.exists() else {}
        )
    if "vocab" in definition and "config" in definition:
        return _tekken(path, content)
    raise UserError(
        f"--tokenizer-model {path} is JSON, but neither a tokenizer.json nor a tekken.json"
    )


def _sentencepiece(path: Path, content: bytes) -> TokenizerFile:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = pieces.get_piece_size()
    special = tuple(pieces.id_to_piece(at) for at in range(size) if pieces.is_control(at))
    bos, eod = (at if at >= 0 else None for at in (pieces.bos_id(), pieces.eos_id()))
    return TokenizerFile(str(path), "sentencepiece", content, size, bos, eod, special)


def _hugging_face(path: Path, content: bytes, config: dict[str, Any]) -> TokenizerFile:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())

    def token_id(name: str) -> int | None:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else tokenizer.token_to_id(text)

    added = tokenizer.get_added_tokens_decoder()
    size = max((*added, tokenizer.get_vocab_size() - 1)) + 1
    special = tuple(token.content for token in added.values() if token.special)
    bos, eod = token_id("bos_token"), token_id("eos_token")
    return TokenizerFile(str(path), "hugging-face", content, size, bos, eod, special)


def _open_directory(path: Path) -> TokenizerFile:
    """As transformers loads it, which is what training does."""
    if (path / "tekken.json").exists() and not (path / "tokenizer.json").exists():
        return _open_file(path / "tekken.json")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not loaded.is_fast:
        raise UserError(f"--tokenizer-model {path} has no fast tokenizer (tokenizer.json)")
    config = {"bos_token": loaded.bos_token, "eos_token": loaded.eos_token}
    return _hugging_face(path, loaded.backend_tokenizer.to_str().encode(), config)


def _tekken(path: Path, content: bytes) -> TokenizerFile:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(path)
    special = tuple(
        tokenizer.id_to_piece(at) for at in range(min(tokenizer.num_special_tokens, 32))
    )
    return TokenizerFile(
        str(path), "tekken", content, tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, special
    )
