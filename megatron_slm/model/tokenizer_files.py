"""The files of a Hugging Face tokenizer, which travel with a model."""

from __future__ import annotations

import shutil
from pathlib import Path

FILES = """
    tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json
""".split()
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be made from its files."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what there is of them; `source` may also be a sentencepiece model file."""
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.model")
        return ["tokenizer.model"]
    names = [name for name in FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
