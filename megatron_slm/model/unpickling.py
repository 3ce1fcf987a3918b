"""Unpickle what a checkpoint holds, without running code that somebody may have put there.

The table of blocks (`.metadata`) is read by an unpickler that creates the table's classes and
nothing else; every other object is read by torch.load(weights_only=True).  `refuse_code` makes
torch and Megatron do the same, in this process and in those that it starts.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_slm.errors import UserError
from megatron_slm.files import open_regular

# The classes in a table of blocks, under torch's names and those that Megatron once used.
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


def _check_class(module_name: str, global_name: str) -> None:
    if global_name not in SAFE_CLASSES.get(module_name, "").split():
        raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")


class TableUnpickler(pickle._Unpickler):
    """An unpickler that creates the classes of SAFE_CLASSES and nothing else.

    It is the one in Python: the one in C allocates as much memory as ten bytes of a file tell it
    to.
    """

    def find_class(self, module: str, name: str) -> Any:
        _check_class(module, name)
        return super().find_class(module, name)


class _FastTableUnpickler(pickle.Unpickler):
    """The same unpickler in C, for tables that the one in Python has already read."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        _check_class(module_name, global_name)
        return super().find_class(module_name, global_name)


def load_object(file: IO[bytes]) -> Any:
    """Load an object that is not a tensor.

    Raises:
        Exception: of any kind, if the object is damaged or would run code.
    """
    import megatron.core  # noqa: F401  registers the classes that checkpoints are made of

    return torch.load(file, map_location="cpu", weights_only=True)


def reason_of(error: Exception) -> str:
    """Say in one line what kept an object from being loaded.

    torch's own message is not used, since it explains how to run the code after all.
    """
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is not None:
        return f"it wants to run {refused[1]}"
    said = str(error) if isinstance(error, ValueError | pickle.UnpicklingError) else repr(error)
    return " ".join(said.split())[:300]


def check_file(path: Path) -> None:
    """Check a checkpoint file of Megatron's older format by loading all but its tensors.

    Raises:
        UserError: the file is damaged, or would run code.
    """
    open_regular(path).close()
    try:
        import megatron.core  # noqa: F401

        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch.load raise
        raise UserError(f"{path} is damaged or would run code: {reason_of(error)}") from error


def check_object(key: str, file: IO[bytes]) -> None:
    """Check an object by loading it, along with pickles within it that are unpickled later.

    Args:
        key: name of the object in the checkpoint.
        file: the pickled object.

    Raises:
        Exception: of any kind, if the object is damaged or would run code.
    """
    for value in _values(load_object(file)):
        if isinstance(value, io.BytesIO):
            load_object(value)
        elif "_extra_state" in key and isinstance(value, Tensor) and value.dtype == torch.uint8:
            _check_extra_state(value)


def _values(loaded: Any) -> Iterator[Any]:
    """Yield every value within nested containers, visiting each container once.

    A list may hold another many times, or itself.
    """
    seen, todo = set[int](), [loaded]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list | tuple | set):
            if id(value) not in seen:
                seen.add(id(value))
                todo.extend(value.values() if isinstance(value, dict) else value)
        else:
            yield value


def _check_extra_state(state: Tensor) -> None:
    """Check the bytes of an "extra state", which Transformer Engine unpickles as they are."""
    from megatron.core.safe_globals import SafeUnpickler

    if state.numel() > 0:
        with suppress(ImportError):  # without Transformer Engine, nothing unpickles it
            SafeUnpickler(io.BytesIO(state.numpy().tobytes())).load()


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """Read a table safely; this replaces torch's method, which unpickles anything."""
    with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
        table: Metadata = _FastTableUnpickler(file).load()
    if getattr(table, "storage_meta", None) is None:
        table.storage_meta = StorageMeta()
    table.storage_meta.load_id = self.load_id
    return table


def refuse_code() -> None:
    """Make torch and Megatron read checkpoints without running code.  Idempotent."""
    # Some containers set the opposite as well, and then torch refuses to load anything.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    FileSystemReader.read_metadata = _read_metadata
