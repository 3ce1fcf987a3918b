"""Cut input files into tasks.

A task is a contiguous part of the input: a range of a large plain jsonl file (the lines that begin
in the range), one compressed or parquet file, or several small files.  Tasks depend only on the
inputs and the shard size, so they are the same for any number of workers and machines.  A task's
name and its end depend only on its own files, so adding other files does not change it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.errors import UserError

KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".parquet": "parquet",
}
NOT_READ = (".bz2", ".xz", ".lz4")
SKIPPABLE = tuple(number.to_bytes(4, "little") for number in range(0x184D2A50, 0x184D2A60))
READERS = {"zstd": "zstandard", "parquet": "pyarrow"}
FIRST_BYTES = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *SKIPPABLE),
    "parquet": (b"PAR1",),
}


@dataclass(frozen=True)
class Piece:
    """The bytes start to end of an input file of `size` bytes."""

    path: str
    kind: str
    size: int
    modified: int  # nanoseconds
    start: int
    end: int


@dataclass(frozen=True)
class Task:
    """Consecutive pieces that make one shard of this name."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of bytes of input."""
        return sum(piece.end - piece.start for piece in self.pieces)


def plan_tasks(files: Sequence[str], shard_size: int) -> list[Task]:
    """Cut files into tasks of about `shard_size` bytes.

    The order of the files is kept; it becomes the order of the dataset's documents.

    Raises:
        UserError: a file is not readable, or not what its name says.
    """
    tasks: list[list[Piece]] = []
    small: list[Piece] = []
    for path in files:
        piece = open_piece(path)
        if 2 * piece.size < shard_size:
            small.append(piece)
            if not ends_task(piece, shard_size):
                continue
        if small:
            tasks.append(small)
            small = []
        if piece.kind == "jsonl" and piece.size > shard_size:
            for start in range(0, piece.size, shard_size):
                end = min(start + shard_size, piece.size)
                tasks.append([Piece(path, piece.kind, piece.size, piece.modified, start, end)])
        elif 2 * piece.size >= shard_size:
            tasks.append([piece])
    if small:
        tasks.append(small)
    return [Task(task_name(pieces[0]), tuple(pieces)) for pieces in tasks]


def ends_task(piece: Piece, shard_size: int) -> bool:
    """Decide from its size and a hash of its path whether a small file is the last of its task.

    Tasks of small files have half the shard size on average.
    """
    digest = hashlib.sha256(os.path.abspath(piece.path).encode()).digest()
    return int.from_bytes(digest[:8]) * shard_size < 2 * piece.size << 64


def task_name(first: Piece) -> str:
    """Name a task after its first file and the offset in it."""
    path = Path(os.path.abspath(first.path))
    digest = hashlib.sha256(str(path.parent).encode()).hexdigest()
    return f"{path.name}-{digest[:12]}-{first.start:013d}"


def import_for(what: str, package: str) -> None:
    """Import a package that `what` needs, so that it is not found missing after hours of work.

    Raises:
        UserError: it is not installed.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs {package}: pip install 'megatron-slm[data]'") from error


def open_piece(path: str, start: int = 0, end: int | None = None) -> Piece:
    """Return a part of a file, or all of it, after checking that its first bytes fit its name.

    Raises:
        UserError: the file cannot be read, is not of the kind that its name says, or needs a
            package that is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix in NOT_READ:
        raise UserError(f"{path}: {suffix} is not read; compress it with zstd or gzip instead")
    kind = KINDS.get(suffix, "jsonl")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{path} is not a regular file but a directory, pipe or device, which cannot be "
                "read from any byte on: give a file, or send a pipe's jsonl to --input -"
            )
        with open(path, "rb") as file:
            first = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if kind in READERS:
        import_for(path, READERS[kind])
    seen = next((name for name, magic in FIRST_BYTES.items() if first.startswith(magic)), "jsonl")
    if kind != seen:
        has = "nothing in it" if not first else f"the contents of {seen}"
        raise UserError(f"{path} is {kind} by its name, but has {has}; was it cut off?")
    size = status.st_size
    return Piece(path, kind, size, status.st_mtime_ns, start, size if end is None else end)
