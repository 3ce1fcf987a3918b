"""Read and write Megatron's indexed datasets: token ids in .bin, what is where in .idx.

    .idx   magic 9 | version u64 | dtype code u8 | sequences S u64 | document ends D u64
           lengths S x i32 | byte offsets S x i64 | document ends D x i64
    .bin   the token ids of all sequences, without gaps

Here each document is one sequence, so D = S + 1.  Indices are written block by block and mapped to
be read, so memory use does not grow with the data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import UserError
from megatron_slm.files import open_regular, sync

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
ID_TYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in enumerate("u1 i1 <i2 <i4 <i8 <f8 <f4 <u2".split(), start=1)
}
BLOCK = 1 << 20  # sequences

Lengths = NDArray[np.int32]
Blocks = Callable[[], Iterator[Lengths]]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores ids of a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Index:
    """An open .idx, whose arrays are mapped."""

    dtype: np.dtype
    """Type of the token ids."""
    lengths: Lengths
    """int32 [S], the number of tokens of each sequence."""
    offsets: NDArray[np.int64]
    """[S], the byte in the .bin at which each sequence begins."""
    document_ends: NDArray[np.int64]
    """[D], 0 and then the number of sequences up to the end of each document."""


def write_index(path: Path, dtype: np.dtype, count: int, blocks: Blocks) -> None:
    """Write an .idx of `count` one-sequence documents, and sync it to disk.

    Args:
        path: the .idx.
        dtype: type of the token ids.
        count: number of documents.
        blocks: function that yields the lengths in blocks; called twice.
    """
    code = next(code for code, known in ID_TYPES.items() if known == dtype)
    with path.open("wb") as file:
        file.write(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, count, count + 1))
        for lengths in blocks():
            file.write(np.ascontiguousarray(lengths, "<i4"))
        end = 0
        for lengths in blocks():
            ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + end
            file.write(np.concatenate([[end], ends[:-1]]).astype("<i8"))
            end = int(ends[-1])
        for first in range(0, count + 1, BLOCK):
            file.write(np.arange(first, min(first + BLOCK, count + 1), dtype="<i8"))
        sync(file.fileno())


def open_index(path: Path) -> Index:
    """Map an .idx whose header and size agree.

    Raises:
        UserError: it is not such a file, is truncated, or has something after its end.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or header[: len(INDEX_MAGIC)] != INDEX_MAGIC:
        raise UserError(f"{path} is not the index of a Megatron dataset: its first bytes differ")
    _, version, code, sequences, ends = HEADER.unpack(header)
    if version != INDEX_VERSION or code not in ID_TYPES:
        raise UserError(
            f"{path} has version {version} and dtype code {code}, which no reader knows"
        )
    expected = HEADER.size + 12 * sequences + 8 * ends
    if (
        size != expected and size != expected + sequences
    ):  # multimodal datasets add a byte per sequence
        raise UserError(
            f"{path} has {size} bytes, but its header says {sequences} sequences and {ends} "
            f"document ends, which take {expected}: it is truncated or damaged; write it again"
        )
    content = np.memmap(path, mode="r", dtype=np.uint8)[HEADER.size :]
    return Index(
        ID_TYPES[code],
        content[: 4 * sequences].view("<i4"),
        content[4 * sequences : 12 * sequences].view("<i8"),
        content[12 * sequences : 12 * sequences + 8 * ends].view("<i8"),
    )


def length_blocks(lengths: Lengths) -> Iterator[Lengths]:
    """Yield views of at most BLOCK lengths."""
    for first in range(0, len(lengths), BLOCK):
        yield lengths[first : first + BLOCK]
