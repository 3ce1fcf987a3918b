"""Megatron's torch_dist checkpoints, read and written a block at a time.

The format is torch.distributed.checkpoint's: one file a rank with torch.save'd blocks, and a
pickled table of them, `.metadata`.  torch's own writer keeps a tensor of every name in memory until
its file is closed, so it cannot stream; its reader plans the reads here.

Pickles run code.  `.metadata` is read by an unpickler that knows the table's classes and nothing
else, everything else by torch.load(weights_only=True).  What has passed here is safe to unpickle.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_slm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
ARGUMENTS = "common_state/shard_0_1"
NO_EXTRA_STATE = torch.empty(0, dtype=torch.uint8)  # as Transformer Engine has it without fp8

# All that a table of blocks is made of, in torch's names and in those Megatron once used.
SAFE_CLASSES = {
    "torch.distributed.checkpoint.metadata": """
        Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties
        MetadataIndex StorageMeta _MEM_FORMAT_ENCODING
    """,
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.distributed.checkpoint.planner": """
        SavePlan WriteItem WriteItemType TensorWriteData
    """,
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "torch.serialization": "_get_layout",
    "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 uint8 int8 int16 "
    "int32 int64 bool",
    "pathlib": "Path PosixPath",
    "pathlib._local": "Path PosixPath",
    "collections": "OrderedDict",
}


class TableUnpickler(pickle.Unpickler):
    """Makes the classes of SAFE_CLASSES and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in SAFE_CLASSES.get(module_name, "").split():
            raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_table(directory: Path) -> Metadata:
    """The table of blocks, after a check that they lie within the files that should hold them.

    Raises:
        UserError: no table, one that is damaged or would run code, or files missing or truncated.
    """
    path = directory / ".metadata"
    if not path.is_file():
        raise UserError(
            f"the checkpoint {directory} has no .metadata file: it is not in Megatron's "
            "torch_dist format, or its writing was cut short"
        )
    try:
        with path.open("rb") as file:
            table: Metadata = TableUnpickler(file).load()
        needed: dict[str, int] = {}
        for part in table.storage_data.values():
            end = part.offset + part.length
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), end)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise UserError(f"{path} is damaged: {error}") from error
    for name, size in needed.items():
        part = directory / name
        have = part.stat().st_size if part.is_file() else None
        if have is None or have < size:
            state = "missing" if have is None else f"truncated ({have} of {size} bytes)"
            raise UserError(
                f"the checkpoint is incomplete: {part} is {state}; copy it again or choose "
                "another iteration"
            )
    return table


class TorchDistReader:
    """One iteration's checkpoint.

    Raises:
        UserError: as read_table.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.table = read_table(directory)
        self.reader = FileSystemReader(directory)
        self.reader.set_up_storage_reader(self.table, is_coordinator=True)

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """What is not a tensor: "args", "iteration" and more.

        Raises:
            UserError: damaged, or it would run code.
        """
        import megatron.core  # noqa: F401  registers the classes that arguments are made of

        legacy = self.directory / "common.pt"
        try:
            if legacy.is_file():
                loaded: dict[str, Any] = torch.load(legacy, map_location="cpu", weights_only=True)
                return loaded
            part = self.table.storage_data[MetadataIndex(ARGUMENTS)]
            with (self.directory / part.relative_path).open("rb") as file:
                file.seek(part.offset)
                content = io.BytesIO(file.read(part.length))
            return torch.load(content, map_location="cpu", weights_only=True)[0]
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise UserError(
                f"the checkpoint {self.directory} has no readable arguments ({error}); save it "
                "with Megatron's --ckpt-format torch_dist"
            ) from error

    @property
    def arguments(self) -> Namespace:
        """Those of the run that saved it."""
        found: Namespace = self.common_state["args"]
        return found

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Shape and dtype of a tensor.

        Raises:
            UserError: there is none of that name.
        """
        found = self.table.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(f"the checkpoint {self.directory} has no tensor {key}")
        return found

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A part of a tensor, put together from the blocks that hold it.

        Raises:
            UserError: no block has some of it.
        """
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        tensor = self.tensor(key)
        result = torch.empty(size, dtype=tensor.properties.dtype)
        items = create_read_items_for_chunk_list(key, tensor, [wanted])
        if sum(prod(item.lengths) for item in items) < prod(size):
            raise UserError(
                f"the checkpoint {self.directory} lacks a part of {key}; copy it again or choose "
                "another iteration"
            )
        self.reader.read_data(LoadPlan(items), _Into(result)).wait()
        return result


class _Into(LoadPlanner):
    """Has everything that is read put into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner


@dataclass(frozen=True)
class Part:
    """A block to write.  make() gives it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


Stored = dict[MetadataIndex, _StorageInfo]


def write_parts(
    directory: Path, name: str, parts: Iterable[Part], objects: dict[str, Any]
) -> Stored:
    """Write one file, holding one part in memory at a time.

    Args:
        objects: by name; each is stored as Megatron stores what is not a tensor.

    Returns:
        where everything lies, for write_table.
    """
    stored: Stored = {}
    with (directory / name).open("wb") as file:

        def put(index: MetadataIndex, value: Any) -> None:
            start = file.tell()
            torch.save(value, file)
            stored[index] = _StorageInfo(name, start, file.tell() - start)

        for part in parts:
            tensor = part.make().view(part.size)
            assert tensor.dtype == part.dtype
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save writes the whole storage
            put(MetadataIndex(part.key, part.offset), tensor)
            del tensor
        for key, value in objects.items():
            put(MetadataIndex(key), [value])
        file.flush()
        os.fsync(file.fileno())
    return stored


def write_table(directory: Path, parts: Iterable[Part], stored: Iterable[Stored]) -> None:
    """Finish a checkpoint whose ranks have written their files.

    Args:
        parts: those of all ranks.
        stored: what write_parts returned on each rank.
    """
    lies = {index: info for one in stored for index, info in one.items()}
    table: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for part in parts:
        tensor = table.setdefault(
            part.key,
            TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(part.shape), []),
        )
        assert isinstance(tensor, TensorStorageMetadata)
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.size)))
    table |= {index.fqn: BytesStorageMetadata() for index in lies if index.offset is None}
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    _put_table(directory, Metadata(table, storage_data=lies, version="1.0.0"))


def _put_table(directory: Path, table: Metadata) -> None:
    new = directory / ".metadata.new"
    with new.open("wb") as file:
        pickle.dump(table, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(directory / ".metadata")


def iteration_directory(load: Path, step: int | None, flag: str, step_flag: str) -> Path:
    """The directory of an iteration under what --save wrote to.

    Args:
        step: the iteration; None for the latest, which the tracker file names.
        flag, step_flag: the arguments that load and step come from, for errors.

    Raises:
        UserError: nothing there.
    """
    if not load.is_dir():
        raise UserError(f"{flag} {load}: no such directory")
    if step is None:
        tracker = load / TRACKER
        if not tracker.is_file():
            raise UserError(
                f"{flag} {load}: there is no {TRACKER}; give the directory that --save wrote to, "
                f"or name an iteration with {step_flag}"
            )
        text = tracker.read_text().strip()
        if text != "release" and not text.isdigit():
            raise UserError(f"{tracker}: {text!r} is not an iteration")
        name = "release" if text == "release" else f"iter_{int(text):07d}"
    else:
        name = f"iter_{step:07d}"
    directory = load / name
    if not directory.is_dir():
        have = sorted(path.name for path in load.glob("iter_*"))
        raise UserError(f"{flag} {load}: there is no {name}, only {have or 'nothing'}")
    return directory
