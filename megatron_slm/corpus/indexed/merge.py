"""Merge many shards into one dataset.

The .idx is written from their lengths with numpy.  The .bin is copied by the kernel in parallel; on
file systems that share extents, nothing is copied.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_slm.data.indexed_format import Lengths, length_blocks, open_index, write_index
from megatron_slm.data.manifest_types import FileContent, FileSize
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sha256_of, sync, temporary

COPIED_AT_ONCE = 1 << 26
NOT_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class DocumentRange:
    """Consecutive documents of a dataset: `count` from number `first` on, `size` bytes from
    `offset` on."""

    prefix: Path
    first: int
    count: int
    offset: int
    size: int

    def lengths(self) -> Lengths:
        """Return the lengths of the documents, in tokens."""
        return open_index(Path(f"{self.prefix}.idx")).lengths[self.first : self.first + self.count]


def merge(
    prefix: Path, parts: Sequence[DocumentRange], dtype: np.dtype, workers: int
) -> tuple[FileSize, FileContent]:
    """Write PREFIX.bin.next and .idx.next.

    Args:
        prefix: the dataset's path without .bin and .idx.
        parts: what the dataset consists of, in order.
        dtype: type of the token ids.
        workers: number of threads.

    Returns:
        What manifests record of .bin and .idx.

    Raises:
        UserError: the disk is full.
    """
    unfinished = temporary(Path(f"{prefix}.bin"))
    index = temporary(Path(f"{prefix}.idx"))
    total = sum(part.size for part in parts)
    try:
        _copy_all(parts, unfinished, total, workers)
        documents = sum(part.count for part in parts)
        write_index(index, dtype, documents, lambda: _all_lengths(parts))
        digest = sha256_of(index)
        size = index.stat().st_size
        publish(unfinished, Path(f"{prefix}.bin.next"))
        publish(index, Path(f"{prefix}.idx.next"))
    except OSError as error:
        raise UserError(f"cannot write {prefix}.bin and .idx: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return FileSize(total), FileContent(size, digest)


def _all_lengths(parts: Sequence[DocumentRange]) -> Iterator[Lengths]:
    for part in parts:
        yield from length_blocks(part.lengths())


def _copy_all(parts: Sequence[DocumentRange], path: Path, total: int, workers: int) -> None:
    with path.open("wb") as file, ThreadPoolExecutor(workers) as pool:
        file.truncate(total)
        at, copies = 0, []
        for part in parts:
            copies.append(pool.submit(_copy, part, file.fileno(), at))
            at += part.size
        for copy in copies:
            copy.result()
        sync(file.fileno())


def _copy(part: DocumentRange, target: int, at: int) -> None:
    by_kernel = hasattr(os, "copy_file_range")
    with open(f"{part.prefix}.bin", "rb", buffering=0) as source:
        done = 0
        while done < part.size:
            wanted = min(COPIED_AT_ONCE, part.size - done)
            if by_kernel:
                try:
                    copied = os.copy_file_range(
                        source.fileno(), target, wanted, part.offset + done, at + done
                    )
                except OSError as error:
                    if error.errno not in NOT_BY_KERNEL:
                        raise
                    copied = 0
                if copied == 0:  # which some file systems answer where they cannot
                    by_kernel = False
                    continue
            else:
                block = os.pread(source.fileno(), min(wanted, 1 << 22), part.offset + done)
                copied = os.pwrite(target, block, at + done)
                if copied == 0:
                    name = f"{part.prefix}.bin"
                    raise OSError(errno.EIO, f"{name} became shorter while it was copied")
            done += copied
