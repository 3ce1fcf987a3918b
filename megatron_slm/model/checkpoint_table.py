"""Read the table of a torch_dist checkpoint, `.metadata`, and check it before anything uses it.

A stranger may have written the table.  Once checked, it has the types and sizes that torch expects,
and every block that it names lies within a regular file of the checkpoint's directory.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_slm.errors import UserError
from megatron_slm.files import inside, read_bounded, read_json
from megatron_slm.model.unpickling import TableUnpickler, reason_of

FORMAT_FILE = "metadata.json"  # Megatron writes one line into it
TABLE_LIMIT = 1 << 30  # bytes; a table of 50,000 blocks has 12 MB

_Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Shape = tuple[_Count, ...]


class Format(Struct):
    """The content of metadata.json."""

    sharded_backend: Literal["torch_dist"]
    sharded_backend_version: Literal[1] = 1


class Place(Struct):
    """The place of a block: a file, an offset and a length in bytes."""

    relative_path: str
    offset: _Count
    length: _Count
    transform_descriptors: None = None


class Chunk(Struct):
    """A block of a tensor, by its offset in the tensor and its shape."""

    offsets: Shape
    sizes: Shape


class StoredTensor(Struct):
    """A tensor's entry in the table."""

    size: Shape
    chunks: list[Chunk]


def read_checkpoint_table(directory: Path) -> Metadata:
    """Read the table of blocks, and check it against itself and the files that hold the blocks.

    Raises:
        UserError: there is no table, it is damaged or would run code, the checkpoint has another
            format, or a file is missing or truncated.
    """
    path = directory / ".metadata"
    if not path.exists():
        raise UserError(
            f"the checkpoint {directory} has no .metadata file: it is not in Megatron's "
            "torch_dist format, or its writing was cut short"
        )
    read_json(directory / FORMAT_FILE, Format, 1 << 16)
    content = read_bounded(path, TABLE_LIMIT)
    try:
        table = TableUnpickler(io.BytesIO(content)).load()
        needed = _checked(table)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise UserError(f"{path} is damaged: {reason_of(error)}") from error
    for name, size in needed.items():
        part = inside(directory, name)
        have = part.stat().st_size if part.is_file() else None
        if have is None or have < size:
            state = "missing" if have is None else f"truncated ({have} of {size} bytes)"
            raise UserError(
                f"the checkpoint is incomplete: {part} is {state}; copy it again or choose "
                "another iteration"
            )
    checked: Metadata = table
    return checked


def other_weights(table: Metadata, known: Collection[str]) -> list[str]:
    """Return the names of a model's weights that are not among the known ones, in order.

    Those of layers that predict more tokens are passed over.
    """
    return [
        name
        for name, value in sorted(table.state_dict_metadata.items())
        if isinstance(value, TensorStorageMetadata)
        and name not in known
        and not (name.startswith("mtp.") or "optimizer." in name)
    ]


def _checked(table: Any) -> dict[str, int]:
    """Check the table, and return how many bytes each file must have at least.

    Raises:
        ValueError: something is not as torch writes it; the message names it.
    """
    _must(isinstance(table, Metadata), "it is not a table of blocks")
    _must(isinstance(table.storage_data, dict), "it does not say where blocks lie")
    _must(isinstance(table.state_dict_metadata, dict), "it does not say what there is")
    needed: dict[str, int] = {}
    for index, info in table.storage_data.items():
        _must(isinstance(index, MetadataIndex) and isinstance(index.fqn, str), f"block {index!r}")
        _must(isinstance(info, _StorageInfo), f"block {index.fqn}")
        place = _convert(info, Place, index.fqn)
        end = place.offset + place.length
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
    for key, value in table.state_dict_metadata.items():
        _must(isinstance(key, str), f"the name {key!r}")
        if isinstance(value, BytesStorageMetadata):
            _must(MetadataIndex(key) in table.storage_data, f"{key} lies nowhere")
        else:
            _must(isinstance(value, TensorStorageMetadata), f"{key} is no tensor")
            _check_tensor(key, value, table.storage_data)
    return needed


def _check_tensor(
    key: str, tensor: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]
) -> None:
    stored = _convert(tensor, StoredTensor, key)
    itemsize = tensor.properties.dtype.itemsize
    for chunk, own in zip(stored.chunks, tensor.chunks, strict=True):
        _must(isinstance(own, ChunkStorageMetadata), f"{key} has a chunk {own!r}")
        _must(
            len(chunk.offsets) == len(chunk.sizes) == len(stored.size)
            and all(
                offset + size <= whole
                for offset, size, whole in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
            ),
            f"{key} has a chunk outside of it",
        )
        place = storage.get(MetadataIndex(key, own.offsets))
        _must(place is not None, f"{key} has a chunk that lies nowhere")
        assert place is not None
        _must(prod(chunk.sizes) * itemsize <= place.length, f"{key} has a chunk too short for it")


def _convert[T](value: Any, kind: type[T], name: str) -> T:
    try:
        return msgspec.convert(value, kind, from_attributes=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error


def _must(right: bool, otherwise: str) -> None:
    if not right:
        raise ValueError(otherwise)
