"""Read and write Megatron's torch_dist checkpoints, one block at a time.

The format is that of torch.distributed.checkpoint: each rank has a file of blocks written by
torch.save, and `.metadata` is a pickled table of them.  torch's own writer cannot stream, since it
keeps every tensor in memory until its file is closed.  Its reader is used to plan the reads.

Pickles can run code, so everything pickled is read by unpickling.py.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
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
from megatron_slm.files import open_regular, read_bounded
from megatron_slm.model.checkpoint_table import FORMAT_FILE, read_checkpoint_table
from megatron_slm.model.saved_arguments import check_common_state
from megatron_slm.model.unpickling import check_object, load_object, reason_of

TRACKER = "latest_checkpointed_iteration.txt"
ARGUMENTS = "common_state/shard_0_1"
NO_EXTRA_STATE = torch.empty(0, dtype=torch.uint8)  # what Transformer Engine stores without fp8
TRACKER_LIMIT = 1000  # bytes
OBJECT_LIMIT = 1 << 30  # bytes of what is not a tensor


class TorchDistReader:
    """A reader of one iteration's checkpoint.

    Args:
        directory: the iteration's directory.

    Raises:
        UserError: the checkpoint's table cannot be read (read_checkpoint_table).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.table = read_checkpoint_table(directory)
        self.reader = FileSystemReader(directory)
        self.reader.set_up_storage_reader(self.table, is_coordinator=True)

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """What the checkpoint has besides tensors: "args", "iteration" and more.

        Raises:
            UserError: it is damaged, from a newer Megatron, or would run code.
        """
        legacy = self.directory / "common.pt"
        try:
            if legacy.exists():
                found = load_object(io.BytesIO(read_bounded(legacy, OBJECT_LIMIT)))
            else:
                found = load_object(self._object(ARGUMENTS))[0]
            check_common_state(found)
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise UserError(
                f"the checkpoint {self.directory} has no readable arguments ({reason_of(error)}); "
                "save it with Megatron's --ckpt-format torch_dist"
            ) from error
        common: dict[str, Any] = found
        return common

    @property
    def arguments(self) -> Namespace:
        """The arguments of the run that saved the checkpoint."""
        found: Namespace = self.common_state["args"]
        return found

    def check_objects(self) -> None:
        """Check every object that is not a tensor by loading it, as Megatron may do later.

        Raises:
            UserError: an object is damaged, or would run code.
        """
        for key, value in self.table.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                try:
                    check_object(key, self._object(key))
                except Exception as error:  # whatever a damaged file makes torch.load raise
                    raise UserError(
                        f"the checkpoint {self.directory} has an object {key} that is damaged or "
                        f"would run code: {reason_of(error)}"
                    ) from error

    def _object(self, key: str) -> io.BytesIO:
        place = self.table.storage_data[MetadataIndex(key)]
        if place.length > OBJECT_LIMIT:
            raise ValueError(f"it has {place.length} bytes, too many for what is not a tensor")
        with open_regular(self.directory / place.relative_path) as file:
            file.seek(place.offset)
            return io.BytesIO(file.read(place.length))

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Return the table's entry for a tensor, with its shape and dtype.

        Raises:
            UserError: there is no tensor of that name.
        """
        found = self.table.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(f"the checkpoint {self.directory} has no tensor {key}")
        return found

    def read(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Read a part of a tensor from the blocks that hold it.

        Args:
            key: name of the tensor.
            offset: where the part begins, in each dimension.
            size: shape of the part.

        Raises:
            UserError: the blocks do not cover the part, or one is damaged or gone.
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
        try:
            self.reader.read_data(LoadPlan(items), _Into(result)).wait()
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise UserError(
                f"the checkpoint {self.directory} has a block of {key} that cannot be read: "
                f"{reason_of(error)}; copy it again or choose another iteration"
            ) from error
        return result


class _Into(LoadPlanner):
    """A plan that puts everything that is read into one tensor."""

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
class TensorPart:
    """A block to write."""

    key: str
    """Name of the tensor that it is a part of."""
    shape: tuple[int, ...]
    """Shape of that tensor."""
    offset: tuple[int, ...]
    """Where in it the block begins, in each dimension."""
    size: tuple[int, ...]
    """Shape of the block."""
    dtype: torch.dtype
    """Type of the tensor."""
    make: Callable[[], Tensor]
    """Function that returns the block; called when it is to be written."""


Stored = dict[MetadataIndex, _StorageInfo]


def write_parts(
    directory: Path, name: str, parts: Iterable[TensorPart], objects: dict[str, Any]
) -> Stored:
    """Write one file, with one part in memory at a time.

    Args:
        directory: the iteration's directory.
        name: name of the file.
        parts: the blocks to write.
        objects: further objects by name, stored as Megatron stores what is not a tensor.

    Returns:
        The place of everything written, for write_checkpoint_table.
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


def write_checkpoint_table(
    directory: Path, parts: Iterable[TensorPart], stored: Iterable[Stored]
) -> None:
    """Write the table of a checkpoint whose ranks have written their files, and that nobody reads
    yet.

    Args:
        directory: the iteration's directory.
        parts: the blocks of all ranks.
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
    (directory / FORMAT_FILE).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    metadata = Metadata(table, storage_data=lies, version="1.0.0")
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def iteration_directory(load: Path, step: int | None, flag: str, step_flag: str) -> Path:
    """Return the directory of an iteration's checkpoint.

    Args:
        load: the directory that --save wrote to.
        step: the iteration; None for the latest, which the tracker file names.
        flag: the argument that `load` comes from, for errors.
        step_flag: the argument that `step` comes from, for errors.

    Raises:
        UserError: there is no such checkpoint.
    """
    if not load.is_dir():
        raise UserError(f"{flag} {load}: no such directory")
    name = f"iter_{step:07d}" if step is not None else _latest(load, flag, step_flag)
    directory = load / name
    if not directory.is_dir():
        have = sorted(path.name for path in load.glob("iter_*"))
        raise UserError(f"{flag} {load}: there is no {name}, only {have or 'nothing'}")
    return directory


def saved_iteration(save: str | Path) -> str | None:
    """Return the iteration that the tracker file of a run's --save names; None if there is none."""
    try:
        return (Path(save) / TRACKER).read_text().strip() or None
    except (OSError, ValueError):
        return None


def _latest(load: Path, flag: str, step_flag: str) -> str:
    """Return the name of the directory that the tracker file names."""
    tracker = load / TRACKER
    if not os.path.lexists(tracker):
        raise UserError(
            f"{flag} {load}: there is no {TRACKER}; give the directory that --save wrote to, "
            f"or name an iteration with {step_flag}"
        )
    text = read_bounded(tracker, TRACKER_LIMIT).decode("utf-8", "replace").strip()
    if text == "release":
        return text
    if not re.fullmatch("[0-9]{1,15}", text):
        raise UserError(
            f"{tracker}: {text[:40]!r} is not an iteration; name one with {step_flag}, or write "
            "the latest complete one into that file"
        )
    return f"iter_{int(text):07d}"
