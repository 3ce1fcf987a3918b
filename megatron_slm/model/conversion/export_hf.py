"""Convert a Megatron checkpoint to Hugging Face safetensors, one tensor at a time.

    1. The arguments in the checkpoint give the architecture; its tensors are divided into files.
    2. Rank 0 writes config.json, the index of tensors and the tokenizer's files.
    3. Each rank writes its share of the files: it reads parts of Megatron's tensors, splits them,
       and stores them as safetensors.

The checkpoint may have any layout, and may be from any step of training; only weights are read.
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
    from_megatron,
    number_of_tokens,
    vocabulary_of,
)
from megatron_slm.model.checkpoint_table import other_weights
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
from megatron_slm.model.hugging_face_config import (
    SPECIAL_IDS,
    from_hugging_face,
    to_hugging_face,
)
from megatron_slm.model.torch_dist import TorchDistReader


@dataclass(frozen=True)
class _Plan:
    """What a checkpoint becomes."""

    reader: TorchDistReader
    """The checkpoint."""
    architecture: Architecture
    """The architecture of its model."""
    original: dict[str, Any] | None
    """config.json of --like, if that is given."""
    files: dict[str, list[Entry]]
    """The tensors of each file to write."""
    read: Callable[[str], Tensor]
    """Function that reads a tensor by its Hugging Face name."""


def export_hugging_face(
    checkpoint: Path,
    target: Path,
    like: Path | None,
    vocabulary: int | None,
    shard_bytes: int,
) -> Architecture:
    """Convert one iteration's checkpoint to a Hugging Face directory.  Collective over ranks.

    Args:
        checkpoint: directory of the iteration.
        target: the directory to write; it must not exist, or be empty.
        like: Hugging Face directory of the same architecture, from which the tokenizer is taken,
            and what its config.json has beyond the architecture.
        vocabulary: number of tokens; None for that of `like`, or else of the checkpoint.
        shard_bytes: largest size of a file.

    Returns:
        The architecture of the model.

    Raises:
        UserError: the model is of no family, or not of the architecture of `like`; a tensor is
            missing or has the wrong shape; the run's tokenizer was replaced, or transformers cannot
            use it as the run did; or the directory cannot be written.
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
    source = {name: each for each in _checked_blocks(reader, architecture) for name in each.names}
    entries = [
        Entry(name, shape, reader.tensor(source[name].key).properties.dtype)
        for name, shape in hugging_face_shapes(architecture).items()
    ]
    _check_size(reader, entries)

    @lru_cache(maxsize=1)  # queries, keys and values share a block
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
    """Write everything except the tensors."""
    with saying_where(target):
        tokenizer = like or _own_tokenizer(plan.reader.arguments)
        if like is not None:
            _say_if_another(like, plan.reader.arguments)
        # transformers takes the class of some tokenizers from the model's type.
        (directory / CONFIG).write_text(_config(plan, {}))
        if tokenizer is not None:
            (directory / CONFIG).write_text(_config(plan, copy_tokenizer(tokenizer, directory)))
        if len(plan.files) > 1:
            write_weight_index(directory, plan.files)


def _write_tensors(plan: _Plan, directory: Path, target: Path) -> None:
    """Write this rank's share of the files."""
    rank, size = this_rank()
    with saying_where(target):
        for name in list(plan.files)[rank::size]:
            write_file(directory / name, plan.files[name], plan.read)


def _check_same(trained: Architecture, like: Architecture, where: str, where_like: str) -> None:
    """Refuse a --like of another architecture.

    The number of positions may differ, since rotary embeddings have no weights for them.  `tied`
    may differ too, since the weights can contradict config.json.
    """
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
    """Return the model's blocks, after checking that the checkpoint has their tensors in full."""
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
    if others := other_weights(reader.table, {block.key for block in found}):
        raise UserError(
            f"{reader.directory} has {others[0]}, which is not what its arguments describe, "
            "and which would be lost: save it with the options that describe its model"
        )
    return found


def _check_size(reader: TorchDistReader, entries: list[Entry]) -> None:
    """Refuse a damaged table whose tensors are larger than the files, and could exhaust memory."""
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


def _config(plan: _Plan, ids: dict[str, int | None]) -> str:
    """Return the text of config.json.

    With --like, it is that one's, with the architecture written over it.  Otherwise the ids of
    special tokens come from the tokenizer, or else from what the run or the import recorded; if its
    end of text is one of those of the model that was imported, they are that model's, which may
    have several.  Ids that are not known are written as null, since transformers assumes 1 and 2 if
    they are absent.
    """
    (first, *_), *_ = plan.files.values()
    own = to_hugging_face(plan.architecture, str(first.dtype).removeprefix("torch."))
    if plan.original is None:
        known = _recorded_ids(plan.reader, "slm_special_ids") | ids
        model = _recorded_ids(plan.reader, "slm_model_special_ids")
        end, ends = known.get("eos_token_id"), model.get("eos_token_id")
        if end is not None and end in (ends if isinstance(ends, list) else [ends]):
            known = model
        whole = own | {name: known.get(name) for name in SPECIAL_IDS}
    else:
        renamed = ("rope_parameters", "dtype")  # transformers 5's names for keys that `own` has
        whole = {name: each for name, each in plan.original.items() if name not in renamed} | own
    return json.dumps(whole, indent=2) + "\n"


def _recorded_ids(reader: TorchDistReader, name: str) -> dict[str, int | list[int] | None]:
    """Return the ids of special tokens that an argument of the checkpoint has."""
    try:
        return msgspec.convert(
            getattr(reader.arguments, name, None) or {}, dict[str, int | list[int] | None]
        )
    except msgspec.ValidationError as error:
        raise UserError(f"{reader.directory}: its argument {name}: {error}") from error


def _own_tokenizer(arguments: Namespace) -> Path | None:
    """Return the file or directory of the run's tokenizer; print why if it cannot be copied.

    Raises:
        UserError: the tokenizer cannot be exported, or is no longer the one that the run used.
    """
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
    known = getattr(arguments, "slm_tokenizer", None)  # only runs of megatron-slm record it
    if known is not None:
        try:
            same = fingerprint_of_files(arguments) == known
        except Exception as error:  # whatever reading some other file raises
            raise UserError(f"the tokenizer {path} cannot be read: {error}; use --like") from error
        if not same:
            raise UserError(
                f"{path}, in {Path.cwd()}, is another tokenizer than the one of this name that the "
                "run used; start from the run's directory, or name a Hugging Face directory that "
                "has the right one with --like"
            )
    return path


def _say_if_another(like: Path, arguments: Namespace) -> None:
    """Warn if --like has another tokenizer than the run used, as far as they can be compared."""
    known = getattr(arguments, "slm_tokenizer", None)
    if known is None:
        return
    single = like / "tokenizer.model"
    try:
        of_one_file = single.is_file() and Path(arguments.tokenizer_model).is_file()
        own = vars(arguments) | {"tokenizer_model": str(single if of_one_file else like)}
        found = fingerprint_of_files(Namespace(**own))
    except Exception:  # --like has another kind of tokenizer, or none
        return
    if found != known:
        print(
            f"--like {like} has another tokenizer than the run used "
            f"({arguments.tokenizer_type} {arguments.tokenizer_model})",
            file=sys.stderr,
        )


def _vocabulary(arguments: Namespace) -> int:
    """Return the model's number of tokens; with the padding if the checkpoint does not say more.

    Raises:
        UserError: the checkpoint does not have it at all.
    """
    padded = getattr(arguments, "padded_vocab_size", None)
    found = vocabulary_of(arguments)
    if found is None and padded is not None:
        found = number_of_tokens(padded, "padded_vocab_size")
    if found is None:
        raise UserError("the checkpoint does not say how many tokens it has; give --vocab-size")
    return found
