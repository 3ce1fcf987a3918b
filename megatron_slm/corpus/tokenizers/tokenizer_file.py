"""Tokenizer files: sentencepiece .model, Hugging Face tokenizer.json or directory, Mistral tekken.

The file's bytes go to the workers, which need nothing else, and their hash identifies the tokenizer
in manifests.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megatron_slm.data.dataset_check import TOKENIZER_KINDS
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, open_regular, read_bounded, read_json

LARGEST_TOKENIZER = 1 << 28  # bytes of a file; the largest vocabularies take a seventh
MOST_TOKENS = 1 << 26


class AddedToken(msgspec.Struct):
    """A token of tokenizer_config.json."""

    content: str


class Config(msgspec.Struct):
    """What is read of a tokenizer_config.json."""

    bos_token: AddedToken | str | None = None
    eos_token: AddedToken | str | None = None


class TekkenConfig(msgspec.Struct):
    """Sizes in a tekken.json, for which Mistral's library makes lists."""

    default_vocab_size: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    default_num_special_tokens: Annotated[int, Meta(ge=0, le=1 << 20)]


class Tekken(msgspec.Struct):
    """What is checked of a tekken.json before Mistral's library reads it."""

    config: TekkenConfig
    vocab: list[dict[str, Any]]


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
    except UserError as error:
        raise UserError(f"--tokenizer-model {path}: {error}") from error
    except BaseException as error:  # every tokenizer library has its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = " ".join(str(error).split())[:500] or type(error).__name__
        raise UserError(
            f"--tokenizer-model {path} is no tokenizer that can be read: {what}"
        ) from error
    if not 0 < found.vocab_size <= MOST_TOKENS:
        raise UserError(f"--tokenizer-model {path} has a vocabulary of {found.vocab_size} tokens")
    if megatron_type is not None and TOKENIZER_KINDS[megatron_type] != found.kind:
        raise UserError(f"--tokenizer-type {megatron_type}, but {path} is a {found.kind} tokenizer")
    return found


def _open_file(path: Path) -> TokenizerFile:
    content = read_bounded(path, LARGEST_TOKENIZER)
    if not content.lstrip().startswith(b"{"):
        return _sentencepiece(path, content)
    definition = decode_json(content, dict[str, Any], path)
    if "model" in definition:
        config = path.with_name("tokenizer_config.json")
        return _hugging_face(
            path, content, read_json(config, Config) if config.exists() else Config()
        )
    if "vocab" in definition and "config" in definition:
        decode_json(content, Tekken, path)
        return _tekken(path, content)
    raise UserError("it is JSON, but neither a tokenizer.json nor a tekken.json")


def _sentencepiece(path: Path, content: bytes) -> TokenizerFile:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = pieces.get_piece_size()
    special = tuple(pieces.id_to_piece(at) for at in range(size) if pieces.is_control(at))
    bos, eod = (at if at >= 0 else None for at in (pieces.bos_id(), pieces.eos_id()))
    return TokenizerFile(str(path), "sentencepiece", content, size, bos, eod, special)


def _hugging_face(path: Path, content: bytes, config: Config) -> TokenizerFile:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode())

    def token_id(token: AddedToken | str | None) -> int | None:
        text = token.content if isinstance(token, AddedToken) else token
        return None if text is None else tokenizer.token_to_id(text)

    added = tokenizer.get_added_tokens_decoder()
    size = max((*added, tokenizer.get_vocab_size() - 1)) + 1
    special = tuple(token.content for token in added.values() if token.special)
    bos, eod = token_id(config.bos_token), token_id(config.eos_token)
    return TokenizerFile(str(path), "hugging-face", content, size, bos, eod, special)


def _open_directory(path: Path) -> TokenizerFile:
    """As transformers loads it, which is what training does."""
    for inner in path.iterdir():
        if inner.suffix in (".json", ".model", ".txt") and not inner.is_dir():
            with open_regular(inner) as file:  # transformers would wait for a pipe
                if os.fstat(file.fileno()).st_size > LARGEST_TOKENIZER:
                    raise UserError(f"{inner} has more than {LARGEST_TOKENIZER} bytes")
    if (path / "tekken.json").exists() and not (path / "tokenizer.json").exists():
        return _open_file(path / "tekken.json")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    if not loaded.is_fast:
        raise UserError("it has no fast tokenizer (tokenizer.json)")
    config = Config(loaded.bos_token, loaded.eos_token)
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
