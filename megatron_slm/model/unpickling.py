"""Unpickle what a checkpoint holds, and run none of the code that somebody may have put there.

The table of blocks (`.metadata`) is read by an unpickler that makes the table's classes and nothing
else; every other object by torch.load(weights_only=True).  `refuse_code` makes torch and Megatron
read checkpoints in the same way wherever they do so in this process and in those it starts.
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


def _check_class(module_name: str, global_name: str) -> None:
    if global_name not in SAFE_CLASSES.get(module_name, "").split():
        raise pickle.UnpicklingError(f"it wants to run {module_name}.{global_name}")


class TableUnpickler(pickle._Unpickler):
    """Makes the classes of SAFE_CLASSES and nothing else.

    Written in Python, for the one in C makes room for as many objects as ten bytes tell it to.
    """

    def find_class(self, module: str, name: str) -> Any:
        _check_class(module, name)
        return super().find_class(module, name)


class _FastTableUnpickler(pickle.Unpickler):
    """The same in C, for tables that have been read once by the other."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        _check_class(module_name, global_name)
        return super().find_class(module_name, global_name)


def load_object(file: IO[bytes]) -> Any:
    """Load what is not a tensor.

    Raises:
        Exception: of any kind: it is damaged, or would run code.
    """
    import megatron.core  # noqa: F401  registers the classes that checkpoints are made of

    return torch.load(file, map_location="cpu", weights_only=True)


def reason_of(error: Exception) -> str:
    """Say in a line what kept an object from being loaded; torch tells how to run it after all."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is not None:
        return f"it wants to run {refused[1]}"
    said = str(error) if isinstance(error, ValueError | pickle.UnpicklingError) else repr(error)
    return " ".join(said.split())[:300]


def check_file(path: Path) -> None:
    """Load a whole checkpoint of Megatron's older format, but not its tensors.

    Raises:
        UserError: it is damaged, or would run code.
    """
    open_regular(path).close()
    try:
        import megatron.core  # noqa: F401

        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch.load raise
        raise UserError(f"{path} is damaged or would run code: {reason_of(error)}") from error


def check_object(key: str, file: IO[bytes]) -> None:
    """Load an object and what is pickled within it, which is unpickled once it has been loaded.

    Raises:
        Exception: of any kind: it is damaged, or would run code.
    """
    for value in _values(load_object(file)):
        if isinstance(value, io.BytesIO):
            load_object(value)
        elif "_extra_state" in key and isinstance(value, Tensor) and value.dtype == torch.uint8:
            _check_extra_state(value)


def _values(loaded: Any) -> Iterator[Any]:
    """Everything within containers, once: a list may hold another many times, or itself."""
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
    """Transformer Engine unpickles the bytes of such a tensor as they are."""
    from megatron.core.safe_globals import SafeUnpickler

    if state.numel() > 0:
        with suppress(ImportError):  # of Transformer Engine, without which nothing unpickles it
            SafeUnpickler(io.BytesIO(state.numpy().tobytes())).load()


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """In the place of torch's, which unpickles anything."""
    with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as file:
        table: Metadata = _FastTableUnpickler(file).load()
    if getattr(table, "storage_meta", None) is None:
        table.storage_meta = StorageMeta()
    table.storage_meta.load_id = self.load_id
    return table


def refuse_code() -> None:
    """Have torch and Megatron read checkpoints without running code.  Idempotent."""
    # Some containers set the opposite, with which torch refuses to load anything.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    FileSystemReader.read_metadata = _read_metadata
