"""A Hugging Face model's safetensors files, read and written a tensor at a time.

The safetensors library reads.  It maps whole files, whose pages then count as this process's
memory, so a file is opened anew for each tensor; and it can only write files that are in memory
whole, so the writing is done here: a header with names, shapes and offsets, then the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_slm.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """A view of the file's pages: it is in memory as far as it is used."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model by name, from the files' headers alone.

    Raises:
        UserError: no safetensors, a file that is missing or damaged, or an unsupported dtype.
    """
    found = {}
    for path in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a mapping
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path}: {name} has dtype {part.get_dtype()}, not "
                            f"{', '.join(DTYPES)}; quantized models are not supported"
                        )
                    shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                    found[name] = StoredTensor(name, path, shape, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or missing: {error}") from error
    return found


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is damaged: {error!r}") from error
        return [directory / name for name in sorted(names)]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = "; its .bin files are pickles, which can run code, and are not read: convert them "
    pickles += "with transformers' save_pretrained(safe_serialization=True) where you trust them"
    raise UserError(
        f"{directory} has neither {INDEX} nor {SINGLE}"
        + (pickles if any(directory.glob("*.bin")) else "")
    )


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def shards(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, in files of at most `limit` bytes unless a single one is larger."""
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
    """Names as transformers gives them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_file(path: Path, entries: list[Entry], read: Callable[[str], Tensor]) -> None:
    """Write one file, holding one tensor in memory at a time."""
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
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
        file.flush()
        os.fsync(file.fileno())


def write_index(directory: Path, files: dict[str, list[Entry]]) -> None:
    """The table of which file has which tensor."""
    size = sum(entry.bytes for entries in files.values() for entry in entries)
    where = {entry.name: name for name, entries in files.items() for entry in entries}
    content = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
