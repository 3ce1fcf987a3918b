"""A Megatron checkpoint to Hugging Face safetensors, a tensor at a time.

    arguments in the checkpoint -> architecture -> tensors, in files of a few gigabytes
    each rank     its files: parts of Megatron's tensors -> split -> safetensors
    rank 0        config.json, the index, the tokenizer's files

Reads checkpoints of any layout and of any step of training, and of them the weights alone.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import (
    Architecture,
    from_megatron,
    to_hugging_face,
    vocabulary_of,
)
from megatron_slm.model.destination import finished_directory, this_rank
from megatron_slm.model.import_hf import read_architecture
from megatron_slm.model.safetensors_files import (
    Entry,
    shard_names,
    shards,
    write_file,
    write_index,
)
from megatron_slm.model.tensors import Block, blocks, hugging_face_shapes, split
from megatron_slm.model.tokenizer_files import (
    copy_tokenizer,
    fingerprint_of_files,
    has_tokenizer,
    special_ids,
)
from megatron_slm.model.torch_dist import TorchDistReader


def export_hugging_face(
    checkpoint: Path,
    target: Path,
    like: Path | None,
    vocabulary: int | None,
    shard_bytes: int,
) -> Architecture:
    """Convert one iteration's checkpoint.  Collective over ranks.

    Args:
        like: a Hugging Face directory of the same architecture, whose tokenizer and whose
            config.json, as far as it says more than the architecture, are taken over.
        vocabulary: number of tokens; None for that of `like`, or of the run that trained.
        shard_bytes: size of a file.

    Raises:
        UserError: a model that is no Llama or Mistral, another architecture than `like`, tensors
            that are missing or of another shape, or another tokenizer than the run's in its place.
    """
    reader = TorchDistReader(checkpoint)
    original = read_architecture(like) if like is not None else None
    tokens = vocabulary or (original.vocabulary if original else _vocabulary(reader.arguments))
    architecture = from_megatron(reader.arguments, tokens, str(checkpoint))
    if original is not None:
        _check_same(architecture, original, f"{checkpoint}", f"--like {like}")
        architecture = replace(architecture, model_type=original.model_type)
    source = {
        name: block for block in _checked_blocks(reader, architecture) for name in block.names
    }
    entries = [
        Entry(name, shape, reader.tensor(source[name].key).properties.dtype)
        for name, shape in hugging_face_shapes(architecture).items()
    ]
    files = shards(entries, shard_bytes)
    named = dict(zip(shard_names(len(files)), files, strict=True))

    @lru_cache(maxsize=1)  # queries, keys and values come from one block
    def parts(block: Block) -> list[Tensor]:
        held = reader.read(block.key, block.offset, block.size)
        return split(architecture, held.view(block.inner), len(block.names))

    def read(name: str) -> Tensor:
        block = source[name]
        return parts(block)[block.names.index(name)]

    rank, size = this_rank()
    tokenizer = like or _own_tokenizer(reader.arguments, say=rank == 0)
    with finished_directory(target) as directory:
        for name in list(named)[rank::size]:
            write_file(directory / name, named[name], read)
        if rank == 0:
            if len(named) > 1:
                write_index(directory, named)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, directory)
            config = _config(architecture, entries, like, directory)
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return architecture


def _check_same(trained: Architecture, like: Architecture, where: str, where_like: str) -> None:
    """Positions may differ: a rotary embedding has as many as one likes, and no weights."""
    differ = [
        f"{field.name} is {here} here and {there} there"
        for field in fields(Architecture)
        if (here := getattr(trained, field.name)) != (there := getattr(like, field.name))
        and field.name not in ("positions", "model_type")
    ]
    if differ:
        raise UserError(
            f"{where} has another architecture than {where_like}: {', '.join(differ)}; name the "
            "directory of a model of the same architecture, or leave --like out"
        )


def _checked_blocks(reader: TorchDistReader, a: Architecture) -> list[Block]:
    """Blocks of the model, whose tensors are in the checkpoint in full."""
    padded = reader.tensor("embedding.word_embeddings.weight").size[0]
    if padded < a.vocabulary:
        raise UserError(
            f"{reader.directory} has {padded} rows of vocabulary, fewer than {a.vocabulary}"
        )
    found = [block for block in blocks(a, padded) if block.names]
    for block in found:
        shape = tuple(reader.tensor(block.key).size)
        if shape != block.shape:
            raise UserError(
                f"{reader.directory}: {block.key} is {list(shape)}, and by its arguments "
                f"{list(block.shape)}"
            )
    return found


def _config(
    a: Architecture, entries: list[Entry], like: Path | None, directory: Path
) -> dict[str, Any]:
    """That of `like`, with what this project knows put over it; without it, the ids of the special
    tokens are those of the tokenizer in `directory`."""
    own = to_hugging_face(a, str(entries[0].dtype).removeprefix("torch."))
    if like is None:
        return own | special_ids(directory)
    original = json.loads((like / "config.json").read_text())
    for renamed in ("rope_parameters", "dtype"):  # since transformers 5, for what `own` has too
        original.pop(renamed, None)
    return original | own


def _own_tokenizer(arguments: Namespace, say: bool) -> Path | None:
    """What the run that trained read text with, if it is a file or directory that is still here.

    Args:
        say: that it is not.
    """
    model = getattr(arguments, "tokenizer_model", None)
    path = None if model is None else Path(model)
    if path is None or not (path.is_file() or has_tokenizer(path)):
        if say:
            why = f"{path} is not in {Path.cwd()}" if path else "the checkpoint names none"
            print(f"no tokenizer is copied: {why}; --like takes one over", file=sys.stderr)
        return None
    known = getattr(arguments, "slm_tokenizer", None)  # only runs of this project's know it
    if known is not None:
        try:
            same = fingerprint_of_files(arguments) == known
        except Exception as error:  # whatever reading some other file raises
            raise UserError(f"the tokenizer {path} cannot be read: {error}; use --like") from error
        if not same:
            raise UserError(
                f"{path}, in {Path.cwd()}, is another tokenizer than that of this name which the "
                "run read text with: start from the run's directory, or name a Hugging Face "
                "directory that has the right one with --like"
            )
    return path


def _vocabulary(arguments: Namespace) -> int:
    """Tokens of the model, or padding and all where the checkpoint does not say."""
    found = vocabulary_of(arguments) or getattr(arguments, "padded_vocab_size", None)
    if found is None:
        raise UserError("the checkpoint does not say how many tokens it has; give --vocab-size")
    return int(found)
