"""Which files to read, and how they are cut into tasks.

A task is a contiguous part of the input: a range of a large plain jsonl file (lines that begin in
the range), one compressed or parquet file, or several small files.  Tasks follow from the inputs
and the shard size alone, so any number of workers and machines makes the same ones.  The name of
one, and where it ends, follow from its own files, so that files added elsewhere leave it as it is.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.progress import say
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
MAGIC = {
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
        """Bytes of input."""
        return sum(piece.end - piece.start for piece in self.pieces)


def plan_tasks(inputs: Sequence[str], shard_size: int) -> list[Task]:
    """Cut the named files into tasks of about `shard_size` bytes, in the order given, which is that
    of the dataset's documents.

    Args:
        inputs: files, directories (all they hold, sorted) and glob patterns (sorted).

    Raises:
        UserError: nothing found, not readable, or not what the name says.
    """
    tasks: list[list[Piece]] = []
    small: list[Piece] = []
    for path in find_files(inputs):
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
    """Whether a small file is the last of its task, by its size and a hash of its path: tasks of
    half the shard size on average."""
    digest = hashlib.sha256(os.path.abspath(piece.path).encode()).digest()
    return int.from_bytes(digest[:8]) * shard_size < 2 * piece.size << 64


def task_name(first: Piece) -> str:
    """After its first file and offset."""
    path = Path(os.path.abspath(first.path))
    digest = hashlib.sha256(str(path.parent).encode()).hexdigest()
    return f"{path.name}-{digest[:12]}-{first.start:013d}"


def find_files(inputs: Iterable[str]) -> list[str]:
    """Every file named, each once."""
    found: dict[str, str] = {}
    for name in inputs:
        if os.path.isdir(name):
            matches = files_below(name)
        elif os.path.exists(name):
            matches = [name]
        else:
            matches = [
                path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path)
            ]
        if not matches:
            raise UserError(
                f"--input {name}: no such file, nothing matches, or a directory without any of "
                f"{', '.join(f'*{suffix}' for suffix in KINDS)}"
            )
        for path in matches:
            where = os.path.abspath(path)
            try:
                where.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{os.fsencode(path)!r} is not UTF-8; rename it") from error
            if where in found:
                raise UserError(f"--input names {path} twice; its documents would count double")
            found[where] = path
    return list(found.values())


def files_below(directory: str) -> list[str]:
    """The inputs in a directory, sorted, also through links to directories, each of these once.
    Files of other kinds (checksums, read-me files) are passed over."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    found: list[Path] = []
    passed_over = 0
    seen = set()
    for root, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            directories.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        directories.sort()
        paths = [Path(root, name) for name in names if not name.startswith(".")]
        inputs = [path for path in paths if path.suffix.lower() in (*KINDS, *NOT_READ)]
        passed_over += len(paths) - len(inputs)
        found += inputs
    if passed_over:
        say(f"{directory}: passed over {passed_over} files of other kinds")
    return [str(path) for path in sorted(found)]


def open_piece(path: str, start: int = 0, end: int | None = None) -> Piece:
    """A part of a file, whose first bytes are as its name says; default: all of it."""
    suffix = Path(path).suffix.lower()
    if suffix in NOT_READ:
        raise UserError(f"{path}: {suffix} is not read; compress it with zstd or gzip instead")
    kind = KINDS.get(suffix, "jsonl")
    try:
        status = os.stat(path)
        with open(path, "rb") as file:
            first = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    seen = next((name for name, magic in MAGIC.items() if first.startswith(magic)), "jsonl")
    if kind != seen:
        has = "nothing in it" if not first else f"the contents of {seen}"
        raise UserError(f"{path} is {kind} by its name, but has {has}; was it cut off?")
    size = status.st_size
    return Piece(path, kind, size, status.st_mtime_ns, start, size if end is None else end)
