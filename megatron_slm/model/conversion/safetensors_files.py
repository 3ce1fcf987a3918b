"""Read and write a Hugging Face model's safetensors files, one tensor at a time.

Reading uses the safetensors library.  It maps whole files into memory, whose pages then count as
this process's, so a file is opened anew for each tensor.  The library can only write files that are
in memory as a whole; so writing is done here: a header with names, shapes and offsets, then bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.files import inside, open_regular, read_json

INDEX_LIMIT = HEADER_LIMIT = (
    16 << 20
)  # bytes; those of a thousand layers have less than one million
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPE_NAMES = {dtype: name for name, dtype in WEIGHT_TYPES.items()}


@dataclass(frozen=True)
class WeightOnDisk:
    """A tensor in a file that is not read yet."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: tuple[int, slice] | None = None
    """The expert and its rows, if this is one expert's share of the tensor of that name."""

    def read(self) -> Tensor:
        """Return the tensor as a view of the file's pages, which are loaded when they are used; a
        part of one as a copy.

        Raises:
            UserError: the file was there when its header was read, and is gone or another now.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                tensor: Tensor
                if self.part is None:
                    tensor = file.get_tensor(self.name)
                else:
                    tensor = file.get_slice(self.name)[self.part]
                return tensor
        except (SafetensorError, OSError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"{self.file} can no longer be read: {said}") from error


class _Index(msgspec.Struct):
    """The index of a model, which says which file has which tensor."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]


def find_tensors(directory: Path) -> dict[str, WeightOnDisk]:
    """Return all tensors of a model by name; only the files' headers are read.

    Raises:
        UserError: there are no safetensors files, a file is missing or damaged, a dtype is not
            supported, or it is ambiguous which file is meant.
    """
    named = _files_by_tensor(directory)
    found: dict[str, WeightOnDisk] = {}
    for path in sorted(set(named.values())) or [directory / SINGLE]:
        for tensor in _tensors_in(path):
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise UserError(
                    f"{other.file} and {path} both hold {tensor.name}; remove the one that is not "
                    "the model's"
                )
    for name, path in named.items():
        if name in found and found[name].file != path:
            raise UserError(f"{directory / INDEX} has {name} in {path}, and {found[name].file} has")
    return found


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor according to the index; nothing if the model is a single
    file without one."""
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        table = read_json(index, _Index, INDEX_LIMIT).weight_map
        if single.is_file() and set(table.values()) != {SINGLE}:
            raise UserError(
                f"{directory} has both {SINGLE}, which transformers reads, and {INDEX}, which "
                "names other files; remove the one that is not the model's"
            )
        return {name: inside(directory, file) for name, file in table.items()}
    if single.is_file():
        return {}
    pickles = "; its .bin files are pickles, which can run code, and are not read: convert them "
    pickles += "with transformers' save_pretrained(safe_serialization=True) where you trust them"
    raise UserError(
        f"{directory} has neither {INDEX} nor {SINGLE}"
        + (pickles if any(directory.glob("*.bin")) else "")
    )


def _tensors_in(path: Path) -> Iterator[WeightOnDisk]:
    with open_regular(path) as file:
        header = int.from_bytes(file.read(8), "little")
    if header > HEADER_LIMIT:
        raise UserError(f"{path} is damaged: a header of {header} bytes")
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                part = tensors.get_slice(name)
                if part.get_dtype() not in WEIGHT_TYPES:
                    raise UserError(
                        f"{path}: {name} has dtype {part.get_dtype()}, not "
                        f"{', '.join(WEIGHT_TYPES)}; quantized models are not supported"
                    )
                yield WeightOnDisk(
                    name, path, tuple(part.get_shape()), WEIGHT_TYPES[part.get_dtype()]
                )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Divide entries, in order, into files of at most `limit` bytes; an entry that is larger gets a
    file of its own."""
    result: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if result[-1] and size + entry.bytes > limit:
            result.append([])
            size = 0
        result[-1].append(entry)
        size += entry.bytes
    return result


def shard_names(count: int) -> list[str]:
    """Return the names that transformers gives to so many files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_file(path: Path, entries: list[Entry], read: Callable[[str], Tensor]) -> None:
    """Write one file, with one tensor in memory at a time.

    Args:
        path: the file.
        entries: its tensors.
        read: function that returns a tensor by name.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.bytes],
        }
        end += entry.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = read(entry.name).contiguous()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype)
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def write_weight_index(directory: Path, files: dict[str, list[Entry]]) -> None:
    """Write the index, which says which file has which tensor."""
    size = sum(entry.bytes for entries in files.values() for entry in entries)
    where = {entry.name: name for name, entries in files.items() for entry in entries}
    content = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
