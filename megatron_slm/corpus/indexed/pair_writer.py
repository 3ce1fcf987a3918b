"""Write an indexed dataset document by document, and publish its files when they are complete."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.indexed_format import length_blocks, token_dtype, write_index
from megatron_slm.data.manifest_types import FileContent, ShardOutput
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sha256_of, sync, temporary


class PairWriter:
    """A writer of an indexed dataset; lengths are spooled to disk."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.vocab_size = vocab_size
        self.documents = self.tokens = 0
        self.digest = hashlib.sha256()
        self.bin = temporary(Path(f"{prefix}.bin"))
        self.lengths = temporary(Path(f"{prefix}.lengths"))
        self.bin_file: BinaryIO = self.bin.open("wb")
        self.lengths_file: BinaryIO = self.lengths.open("wb")

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Write documents.

        Args:
            ids: token ids of all documents, one after the other.
            lengths: number of tokens of each document, none of them 0.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise UserError(
                f"the tokenizer gave ids {ids.min()} to {ids.max()}, beyond its vocabulary of "
                f"{self.vocab_size} tokens: nothing can be trained on these"
            )
        data = memoryview(ids.astype(self.dtype, copy=False)).cast("B") if ids.size else b""
        self.bin_file.write(data)
        self.digest.update(data)
        self.lengths_file.write(memoryview(lengths.astype("<i4")))
        self.documents += len(lengths)
        self.tokens += ids.size

    def finish(self) -> ShardOutput:
        """Publish the two files, and return their part of the manifest."""
        for file in (self.bin_file, self.lengths_file):
            file.flush()
        sync(self.bin_file.fileno())
        index = temporary(Path(f"{self.prefix}.idx"))
        spooled = (
            np.memmap(self.lengths, mode="r", dtype="<i4")
            if self.documents
            else np.empty(0, np.int32)
        )
        write_index(index, self.dtype, self.documents, lambda: length_blocks(spooled))
        idx_digest = sha256_of(index)
        size = index.stat().st_size
        self.lengths_file.close()
        self.bin_file.close()
        publish(self.bin, Path(f"{self.prefix}.bin"))
        publish(index, Path(f"{self.prefix}.idx"))
        written = self.tokens * self.dtype.itemsize
        return ShardOutput(
            self.documents,
            self.tokens,
            bin=FileContent(written, self.digest.hexdigest()),
            idx=FileContent(size, idx_digest),
        )

    def discard(self) -> None:
        """Remove what has not been published."""
        for file, path in ((self.bin_file, self.bin), (self.lengths_file, self.lengths)):
            file.close()
            path.unlink(missing_ok=True)
