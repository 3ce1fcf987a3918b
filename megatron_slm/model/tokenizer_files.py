"""The files of a Hugging Face tokenizer, which travel with a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from megatron_slm.model.sentencepiece_json import write_tokenizer_json

FILES = """
    tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json
""".split()
SETTINGS = ("tokenizer.json", "tokenizer_config.json")  # how to read a vocabulary
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be made from its files."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what there is of them; `source` may also be a file, and a sentencepiece model gets a
    tokenizer.json, which transformers reads."""
    if source.is_file():
        if source.suffix == ".json":
            shutil.copyfile(source, target / source.name)
        else:
            shutil.copyfile(source, target / "tokenizer.model")
            write_tokenizer_json(source, target)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def special_ids(directory: Path) -> dict[str, int | None]:
    """bos_token_id and eos_token_id for config.json; none without what says so."""
    if not all((directory / name).is_file() for name in SETTINGS):
        return {}
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    ids = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        content = token["content"] if isinstance(token, dict) else token
        ids[f"{name}_id"] = None if content is None else tokenizer.token_to_id(content)
    return ids
