"""Read tokenizer files: sentencepiece, Hugging Face (tokenizer.json or directory), Mistral tekken.

The workers get the file's bytes and need nothing else; their hash identifies the tokenizer in
manifests.
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

LARGEST_TOKENIZER = 1 << 28  # bytes; the largest vocabularies take a seventh of it
MOST_TOKENS = 1 << 26


class AddedToken(msgspec.Struct):
    """A token of tokenizer_config.json."""

    content: str


class Config(msgspec.Struct):
    """The part of a tokenizer_config.json that is read."""

    bos_token: AddedToken | str | None = None
    eos_token: AddedToken | str | None = None


class TekkenConfig(msgspec.Struct):
    """Sizes in a tekken.json; Mistral's library allocates lists of these lengths."""

    default_vocab_size: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    default_num_special_tokens: Annotated[int, Meta(ge=0, le=1 << 20)]


class Tekken(msgspec.Struct):
    """The part of a tekken.json that is checked before Mistral's library reads it."""

    config: TekkenConfig
    vocab: list[dict[str, Any]]


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer."""

    path: str
    """Path of its file or directory."""
    kind: str
    """sentencepiece, hugging-face or tekken."""
    content: bytes
    """What engines read."""
    vocab_size: int
    """Number of tokens."""
    bos: int | None
    """Id of the token that begins a document; None if the tokenizer has none."""
    eod: int | None
    """Id of the token that ends a document; None if the tokenizer has none."""
    special_tokens: tuple[str, ...]
    """Special tokens, which text may contain literally."""

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.content).hexdigest()


def open_tokenizer(path: str, megatron_type: str | None = None) -> TokenizerFile:
    """Read a tokenizer.

    Args:
        path: its file or directory.
        megatron_type: Megatron's name of its type, which it is checked against; None for any.

    Raises:
        UserError: there is no such file, or it is not a tokenizer of that type.
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
    """Read a directory as transformers does, which training uses."""
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
