"""Check that a dataset is what its files say, in one of three depths.

quick   header, sizes, ends and a few offsets, and the manifest's sizes, type of ids and tokenizer;
        a few reads whatever the size, so every rank does it when training starts
whole   every length, offset and id, and the hashes in the manifest
deep    also the ids of some documents, which are tokenized again (retokenize.py)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_slm.data.dataset_check import (
    REWRITE,
    CheckedDataset,
    refuse_offsets,
)
from megatron_slm.data.indexed_format import BLOCK
from megatron_slm.data.manifest import read_dataset_manifest
from megatron_slm.data.manifest_types import PairManifest
from megatron_slm.errors import UserError
from megatron_slm.files import inside, sha256_of

READ_BYTES = 1 << 24


def pairs_of(prefix: str) -> Iterator[tuple[str, PairManifest | None]]:
    """Yield the prefix and manifest of each pair of files of a dataset; several if it was not
    merged."""
    manifest = read_dataset_manifest(prefix)
    if manifest is None or manifest.pair is not None:
        yield prefix, None if manifest is None else manifest.pair
        return
    for shard in manifest.shards:
        ((key, output),) = shard.outputs.items()
        if output.documents:
            directory = Path(prefix.removesuffix(f"_{key}_document") + "_shards")
            pair = str(inside(directory, f"{shard.name}_{key}_document"))
            yield pair, PairManifest.of_shard(shard, key)


def check_wholly(dataset: CheckedDataset, vocab_size: int | None, workers: int) -> None:
    """Check a dataset by reading all of it.

    Args:
        dataset: the dataset, which has passed the quick check.
        vocab_size: bound of the ids; None for that of the manifest's tokenizer, if there is one.
        workers: number of threads.

    Raises:
        UserError: something is wrong; the message says what and where.
    """
    prefix, manifest = dataset.prefix, dataset.manifest
    _check_index(dataset)
    if vocab_size is None and manifest is not None:
        vocab_size = manifest.options.tokenizer.vocab_size
    ranges = [("", 0, Path(f"{prefix}.bin").stat().st_size)]
    hashes: list[str | None] = [None]
    if manifest is not None:
        if sha256_of(Path(f"{prefix}.idx")) != manifest.idx.sha256:
            raise UserError(f"{prefix}.idx is not the one that its manifest describes; {REWRITE}")
        ranges, hashes, at = [], [], 0
        for shard in manifest.shards:
            own = shard.output.bin
            ranges.append((shard.name, at, at + own.size))
            hashes.append(own.sha256)
            at += own.size
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda span: _check_ids(dataset, span[1], span[2], vocab_size), ranges)
        for (name, start, _), digest, recorded in zip(ranges, found, hashes, strict=True):
            if recorded is not None and digest != recorded:
                raise UserError(
                    f"{prefix}.bin from byte {start} is not what its manifest describes (the part "
                    f"from {name}); {REWRITE}"
                )


def _check_index(dataset: CheckedDataset) -> None:
    prefix, index = dataset.prefix, dataset.index
    end = 0
    for first in range(0, len(index.lengths), BLOCK):
        lengths = index.lengths[first : first + BLOCK]
        if (lengths < 0).any():
            at = first + int(np.argmax(lengths < 0))
            raise UserError(
                f"{prefix}.idx: sequence {at} has {index.lengths[at]} tokens; {REWRITE}"
            )
        ends = np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize + end
        expected = np.concatenate([[end], ends[:-1]])
        sequences = np.arange(first, first + len(lengths))
        refuse_offsets(prefix, sequences, index.offsets[first : first + BLOCK], expected)
        end = int(ends[-1])
    for first in range(0, len(index.document_ends), BLOCK):
        ends = index.document_ends[first : first + BLOCK + 1]
        if (np.diff(ends) < 0).any():
            at = first + int(np.argmax(np.diff(ends) < 0))
            raise UserError(f"{prefix}.idx: document {at} ends before it begins; {REWRITE}")


def _check_ids(dataset: CheckedDataset, start: int, end: int, vocab_size: int | None) -> str:
    """Check the ids in a range of bytes against the vocabulary, and return the bytes' SHA-256."""
    digest = hashlib.sha256()
    dtype = dataset.index.dtype
    path = Path(f"{dataset.prefix}.bin")
    with path.open("rb") as file:
        file.seek(start)
        for at in range(start, end, READ_BYTES):
            data = file.read(min(READ_BYTES, end - at))
            if len(data) < min(READ_BYTES, end - at):
                raise UserError(f"{path} became shorter while it was read")
            digest.update(data)
            ids = np.frombuffer(data, dtype)
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                wrong = int(np.argmax((ids < 0) | (ids >= (vocab_size or high + 1))))
                token = at // dtype.itemsize + wrong
                offset = token * dtype.itemsize
                document = int(np.searchsorted(dataset.index.offsets, offset, "right")) - 1
                raise UserError(
                    f"{path}: token {token}, in sequence {document}, has id {ids[wrong]}, which a "
                    f"vocabulary of {vocab_size} tokens does not have"
                )
    return digest.hexdigest()
