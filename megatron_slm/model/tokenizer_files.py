"""The files of a Hugging Face tokenizer, which travel with a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_slm.model.sentencepiece_json import write_tokenizer_json

FILES = """
    tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja generation_config.json
""".split()
SETTINGS = ("tokenizer.json", "tokenizer_config.json")  # how to read a vocabulary
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Tokenized and hashed, so that runs can tell whether they read text as the same tokens.
PROBE = "Not all tokens are what you need: 3.14 + 2 = 5.14\n\tdef f(x): return {x}  # naïve 東京 🎲"


def fingerprint(arguments: Namespace, tokenizer: Any) -> str:
    """What identifies a tokenizer of Megatron's, built from these arguments."""
    if arguments.tokenizer_type.startswith("Null"):  # its text is numbers
        tokens = [arguments.tokenizer_type]
    else:
        tokens = list(tokenizer.tokenize(PROBE))
    content = f"{tokens} {tokenizer.vocab_size} {tokenizer.eod}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fingerprint_of_files(arguments: Namespace) -> str:
    """That of the files that a run's arguments name, as they are now; raises what reading them
    does.  None of them is run."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    own = Namespace(**vars(arguments) | {"trust_remote_code": False, "pad_vocab_size": False})
    return fingerprint(own, build_tokenizer(own))


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be made from its files."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what there is of them; `source` may also be a file, under any name, and a sentencepiece
    model gets a tokenizer.json, which transformers reads."""
    if source.is_file():
        if source.suffix == ".json":
            name = "tokenizer.json" if _is_tokenizer_json(source) else source.name
            shutil.copyfile(source, target / name)
        else:
            shutil.copyfile(source, target / "tokenizer.model")
            write_tokenizer_json(source, target)
        return
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _is_tokenizer_json(file: Path) -> bool:
    try:
        Tokenizer.from_file(str(file))
    except Exception:  # all that the library raises
        return False
    return True


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
