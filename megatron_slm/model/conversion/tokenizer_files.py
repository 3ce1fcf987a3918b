"""Copy the files of a tokenizer along with a model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from megatron_slm.errors import UserError
from megatron_slm.files import read_bounded, read_json
from megatron_slm.model.conversion.sentencepiece_json import (
    open_sentencepiece,
    special_ids,
    write_tokenizer_json,
)
from megatron_slm.model.tokenizer_fingerprint import tokenizer_fingerprint

FILES = """
    tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json
""".split()
SETTINGS = ("tokenizer.json", "tokenizer_config.json")  # say how to use a vocabulary
TOKENIZER_LIMIT = 256 << 20  # bytes of a file; Gemma's tokenizer.json has 33 million
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def fingerprint_of_files(arguments: Namespace) -> str:
    """Return the fingerprint of the tokenizer in the files that a run's arguments name.

    The files are read as they are now, and no code in them is run.

    Raises:
        Exception: of any kind, if the files cannot be read.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    own = Namespace(**vars(arguments) | {"trust_remote_code": False, "pad_vocab_size": False})
    return tokenizer_fingerprint(own, build_tokenizer(own))


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has the files of a tokenizer."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Copy a tokenizer's files.

    A sentencepiece model also gets a tokenizer.json, which transformers reads.

    Args:
        source: directory of the tokenizer, or its file under any name.
        target: directory to copy to.

    Returns:
        The ids of bos, eos and pad for config.json, as far as the files give them.

    Raises:
        UserError: transformers would tokenize text differently, or a file cannot be read.
    """
    if not source.is_file():
        for name in FILES:
            if (source / name).is_file():
                _copy(source / name, target / name)
        return _special_ids(source)
    pieces = open_sentencepiece(source)
    if pieces is None:
        name = "tokenizer.json" if _is_tokenizer_json(source) else source.name
        _copy(source, target / name)
        return {}
    _copy(source, target / "tokenizer.model")
    write_tokenizer_json(pieces, target, str(source))
    return special_ids(pieces)


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(read_bounded(source, TOKENIZER_LIMIT))  # so that errors tell the two apart


def _is_tokenizer_json(file: Path) -> bool:
    try:
        Tokenizer.from_str(read_bounded(file, TOKENIZER_LIMIT).decode())
    except Exception:  # all that the library raises
        return False
    return True


class _Token(msgspec.Struct):
    content: str


class _Settings(msgspec.Struct):
    """The special tokens in tokenizer_config.json."""

    bos_token: str | _Token | None = None
    eos_token: str | _Token | None = None
    pad_token: str | _Token | None = None


def _special_ids(directory: Path) -> dict[str, int | None]:
    if not all((directory / name).is_file() for name in SETTINGS):
        return {}
    definition, settings = (directory / name for name in SETTINGS)
    named = msgspec.structs.asdict(read_json(settings, _Settings))
    try:
        tokenizer = Tokenizer.from_str(read_bounded(definition, TOKENIZER_LIMIT).decode())
    except Exception as error:  # all that the library raises
        raise UserError(f"{definition} cannot be read: {error}") from error
    ids = {}
    for name, token in named.items():
        content = token.content if isinstance(token, _Token) else token
        ids[f"{name}_id"] = None if content is None else tokenizer.token_to_id(content)
    return ids
