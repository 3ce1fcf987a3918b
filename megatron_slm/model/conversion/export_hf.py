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
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import (
    Architecture,
    from_hugging_face,
    from_megatron,
    number_of_tokens,
    to_hugging_face,
    vocabulary_of,
)
from megatron_slm.model.conversion.destination import (
    finished_directory,
    on_first_rank,
    saying_where,
    this_rank,
    together,
)
from megatron_slm.model.conversion.import_hf import CONFIG, read_config
from megatron_slm.model.conversion.safetensors_files import (
    TYPE_NAMES,
    Entry,
    shard_names,
    shards,
    write_file,
    write_weight_index,
)
from megatron_slm.model.conversion.tensors import Block, blocks, hugging_face_shapes, split
from megatron_slm.model.conversion.tokenizer_files import (
    copy_tokenizer,
    fingerprint_of_files,
    has_tokenizer,
)
from megatron_slm.model.hugging_face_config import SPECIAL_IDS
from megatron_slm.model.torch_dist import TorchDistReader


@dataclass(frozen=True)
class _Plan:
    """What a checkpoint becomes.

    original: config.json of --like, if any.
    files: tensors by the name of the file to write.
    read: gives a tensor by its name.
    """

    reader: TorchDistReader
    architecture: Architecture
    original: dict[str, Any] | None
    files: dict[str, list[Entry]]
    read: Callable[[str], Tensor]


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
            that are missing or of another shape, another tokenizer than the run's in its place or
            one that transformers cannot read as the run did, or a directory that cannot be written.
    """
    plan = together(partial(_plan, checkpoint, like, vocabulary, shard_bytes))
    with finished_directory(target, "--hf") as directory:
        on_first_rank(partial(_write_settings, plan, like, directory, target))
        together(partial(_write_tensors, plan, directory, target))
    return plan.architecture


def _plan(checkpoint: Path, like: Path | None, vocabulary: int | None, shard_bytes: int) -> _Plan:
    reader = TorchDistReader(checkpoint)
    original = None if like is None else read_config(like)
    likeness = None if original is None else from_hugging_face(original, f"{like}/{CONFIG}")
    tokens = vocabulary or (likeness.vocabulary if likeness else _vocabulary(reader.arguments))
    architecture = from_megatron(reader.arguments, tokens, str(checkpoint))
    if likeness is not None:
        _check_same(architecture, likeness, f"{checkpoint}", f"--like {like}")
        architecture = replace(architecture, model_type=likeness.model_type)
    source = {
        name: block for block in _checked_blocks(reader, architecture) for name in block.names
    }
    entries = [
        Entry(name, shape, reader.tensor(source[name].key).properties.dtype)
        for name, shape in hugging_face_shapes(architecture).items()
    ]
    _check_size(reader, entries)

    @lru_cache(maxsize=1)  # queries, keys and values come from one block
    def parts(block: Block) -> list[Tensor]:
        held = reader.read(block.key, block.offset, block.size)
        return split(architecture, held.view(block.inner), len(block.names))

    def read(name: str) -> Tensor:
        block = source[name]
        return parts(block)[block.names.index(name)]

    files = shards(entries, shard_bytes)
    named = dict(zip(shard_names(len(files)), files, strict=True))
    return _Plan(reader, architecture, original, named, read)


def _write_settings(plan: _Plan, like: Path | None, directory: Path, target: Path) -> None:
    """Write all but the tensors."""
    with saying_where(target):
        tokenizer = like or _own_tokenizer(plan.reader.arguments)
        if like is not None:
            _say_if_another(like, plan.reader.arguments)
        ids = {} if tokenizer is None else copy_tokenizer(tokenizer, directory)
        config = _config(plan, ids)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if len(plan.files) > 1:
            write_weight_index(directory, plan.files)


def _write_tensors(plan: _Plan, directory: Path, target: Path) -> None:
    """Write this rank's files."""
    rank, size = this_rank()
    with saying_where(target):
        for name in list(plan.files)[rank::size]:
            write_file(directory / name, plan.files[name], plan.read)


def _check_same(trained: Architecture, like: Architecture, where: str, where_like: str) -> None:
    """Refuse another architecture.  Positions may differ: a rotary embedding has as many as one
    likes, and no weights.  So may the ties of a config.json that its weights belie."""
    differ = [
        f"{field.name} is {here} here and {there} there"
        for field in fields(Architecture)
        if (here := getattr(trained, field.name)) != (there := getattr(like, field.name))
        and field.name not in ("positions", "model_type", "tied")
    ]
    if differ:
        raise UserError(
            f"{where} has another architecture than {where_like}: {', '.join(differ)}; name the "
            "directory of a model of the same architecture, or leave --like out"
        )


def _checked_blocks(reader: TorchDistReader, a: Architecture) -> list[Block]:
    """Blocks of the model, whose tensors are in the checkpoint in full."""
    size = reader.tensor("embedding.word_embeddings.weight").size
    padded = size[0] if size else 0
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


def _check_size(reader: TorchDistReader, entries: list[Entry]) -> None:
    """A damaged table may promise more than memory holds."""
    for entry in entries:
        if entry.dtype not in TYPE_NAMES:
            raise UserError(
                f"{reader.directory}: {entry.name} would be {entry.dtype}, not {TYPE_NAMES}"
            )
    wanted = sum(entry.bytes for entry in entries)
    have = sum(file.stat().st_size for file in reader.directory.iterdir())
    if wanted > have:
        raise UserError(
            f"{reader.directory} is damaged: its tensors have {wanted} bytes, all its files {have}"
        )


def _config(plan: _Plan, ids: dict[str, int | None]) -> dict[str, Any]:
    """Return the config.json of --like, with what this project knows put over it; without it, the
    ids of special tokens are those of the tokenizer, or else those that the run or the import
    recorded, or none: transformers takes 1 and 2 where config.json is silent."""
    (first, *_), *_ = plan.files.values()
    own = to_hugging_face(plan.architecture, str(first.dtype).removeprefix("torch."))
    if plan.original is None:
        recorded = getattr(plan.reader.arguments, "slm_special_ids", None) or {}
        try:
            known = msgspec.convert(recorded, dict[str, int | list[int] | None])
        except msgspec.ValidationError as error:
            raise UserError(
                f"{plan.reader.directory}: its argument slm_special_ids: {error}"
            ) from error
        return own | {name: (known | ids).get(name) for name in SPECIAL_IDS}
    renamed = ("rope_parameters", "dtype")  # since transformers 5, for what `own` has too
    return {name: value for name, value in plan.original.items() if name not in renamed} | own


def _own_tokenizer(arguments: Namespace) -> Path | None:
    """Return what the run that trained read text with, if it is a file or directory that is still
    here; say so if not."""
    model = getattr(arguments, "tokenizer_model", None)
    path = Path(model) if isinstance(model, str) else None
    if path is None or not (path.is_file() or has_tokenizer(path)):
        why = f"{path} is not in {Path.cwd()}" if path else "the checkpoint names none"
        print(f"no tokenizer is copied: {why}; --like takes one over", file=sys.stderr)
        return None
    special = getattr(arguments, "special_tokens", None)
    if special and getattr(arguments, "tokenizer_sentencepiece_legacy", False):
        raise UserError(
            f"the run added the special tokens {special} to {path}, which a sentencepiece model "
            "cannot have; name a Hugging Face directory with such a tokenizer with --like"
        )
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


def _say_if_another(like: Path, arguments: Namespace) -> None:
    """Compare the tokenizer of --like with the run's, as far as it has a file of that kind."""
    known = getattr(arguments, "slm_tokenizer", None)
    if known is None:
        return
    single = like / "tokenizer.model"
    try:
        of_one_file = single.is_file() and Path(arguments.tokenizer_model).is_file()
        own = vars(arguments) | {"tokenizer_model": str(single if of_one_file else like)}
        found = fingerprint_of_files(Namespace(**own))
    except Exception:  # another kind, or no tokenizer
        return
    if found != known:
        print(
            f"--like {like} has another tokenizer than the run read text with "
            f"({arguments.tokenizer_type} {arguments.tokenizer_model})",
            file=sys.stderr,
        )


def _vocabulary(arguments: Namespace) -> int:
    """Return the tokens of the model, or padding and all where the checkpoint does not say."""
    padded = getattr(arguments, "padded_vocab_size", None)
    found = vocabulary_of(arguments)
    if found is None and padded is not None:
        found = number_of_tokens(padded, "padded_vocab_size")
    if found is None:
        raise UserError("the checkpoint does not say how many tokens it has; give --vocab-size")
    return found
