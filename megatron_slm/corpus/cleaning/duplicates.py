"""Find the documents that repeat an earlier one in any shard.

    1. fingerprint: each task, in parallel, hashes its documents and computes their MinHash bands.
    2. verdicts: one process sorts the hashes, and keeps the first of equal documents.
    3. tokenize: each task drops what the verdicts say.

The result does not depend on the number of workers.  Exact duplicates have the same 128-bit hash.
Near-duplicates share one of 14 bands of 8 MinHash values of their runs of 5 words (FineWeb's
setting, which finds 92% of pairs with Jaccard similarity 0.8, and 5% with 0.5); of each connected
group one is kept.  Memory: about 1 GB for exact duplicates, 50 bytes a document for near ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.cleaning.shingles import mix, shingles
from megatron_slm.corpus.progress import Progress
from megatron_slm.corpus.reading.documents import Wanted, read_documents
from megatron_slm.corpus.reading.input_records import describe_input
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.corpus.reading.lines import InputHash
from megatron_slm.data.indexed_format import BLOCK
from megatron_slm.data.manifest import write_manifest
from megatron_slm.data.manifest_types import Fingerprints, ReadingOptions
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sync, temporary

BANDS, ROWS = 14, 8
BAND_WORDS = 5
SEED = 1
SORTED_AT_ONCE = 1 << 24  # documents
KEEP, EXACT, NEAR = 0, 1, 2

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on a task's documents."""

    dropped: NDArray[np.uint8]
    """uint8 [documents]: KEEP, EXACT or NEAR."""
    inputs: Sequence[str]
    """SHA-256 of the task's pieces, as they were when the documents were fingerprinted."""

    @property
    def sha256(self) -> str:
        """Hash of the verdicts."""
        return hashlib.sha256(self.dropped.tobytes()).hexdigest()


def fingerprint_path(directory: Path, task: Task, kind: str) -> Path:
    """Return the path of a task's fingerprints.

    Args:
        directory: the shards' directory.
        task: the task.
        kind: exact, uint64 [documents, 2]; near, [BANDS, documents]; rows, the transpose of near,
            while it is made; or json, the manifest.
    """
    return directory / f"{task.name}.fingerprints.{kind}"


def fingerprint_documents(
    task: Task, directory: Path, wanted: Wanted, options: ReadingOptions, progress: Progress
) -> Fingerprints:
    """Write a task's fingerprints, and return their manifest.

    Raises:
        UserError: an input is damaged, or the disk is full.
    """
    kinds = ("exact", "rows") if options.dedup == "near" else ("exact",)
    unfinished = {kind: temporary(fingerprint_path(directory, task, kind)) for kind in kinds}
    fingerprint_path(directory, task, "json").unlink(missing_ok=True)
    inputs, documents = [], 0
    try:
        files = {kind: path.open("wb") for kind, path in unfinished.items()}
        for piece in task.pieces:
            seen = InputHash(lambda size: progress(size, 0, 0, 0))
            for batch in read_documents(piece, wanted, seen):
                texts = ["\0".join(texts) for texts in batch.texts]
                files["exact"].write(b"".join(map(exact_hash, texts)))
                if "rows" in files:
                    files["rows"].write(band_hashes(texts).tobytes())
                documents += len(texts)
                progress(0, len(texts), 0, sum(map(len, texts)))
            inputs.append(describe_input(piece, seen.digest.hexdigest()))
        for file in files.values():
            file.flush()
            sync(file.fileno())
            file.close()
        publish(unfinished["exact"], fingerprint_path(directory, task, "exact"))
        if "rows" in unfinished:
            write_columns(unfinished["rows"], documents, fingerprint_path(directory, task, "near"))
            unfinished["rows"].unlink()
    except OSError as error:
        raise UserError(f"cannot write fingerprints to {directory}: {error}") from error
    manifest = Fingerprints(inputs, options, documents)
    write_manifest(fingerprint_path(directory, task, "json"), manifest)
    return manifest


def write_columns(rows: Path, documents: int, path: Path) -> None:
    """Transpose hashes [documents, BANDS] into [BANDS, documents], since the search reads one band
    at a time."""
    unfinished = temporary(path)
    with unfinished.open("wb") as file:
        if documents:
            values = np.memmap(rows, mode="r", dtype=np.uint64).reshape(documents, BANDS)
            for band in range(BANDS):
                for first in range(0, documents, BLOCK):
                    file.write(np.ascontiguousarray(values[first : first + BLOCK, band]))
        file.flush()
        sync(file.fileno())
    publish(unfinished, path)


def exact_hash(text: str) -> bytes:
    """Return a 128-bit hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def band_hashes(texts: Sequence[str]) -> Hashes:
    """Return the MinHash bands of texts, uint64 [texts, BANDS].

    Texts of fewer than BAND_WORDS words share a band only with equal texts.
    """
    from rensa import RMinHash

    found = [shingles(text, BAND_WORDS) for text in texts]
    ends = np.cumsum([0, *map(len, found)], dtype=np.uint64)
    flat = np.concatenate([np.empty(0, np.uint64), *found])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, BANDS * ROWS, SEED).to_rows()
    values = np.array(rows, np.uint64).reshape(len(texts), BANDS, ROWS)
    bands = np.zeros((len(texts), BANDS), np.uint64)
    for row in range(ROWS):
        bands = mix(bands + values[:, :, row] + np.uint64(1))
    for at, text in enumerate(texts):
        if found[at].size == 0:
            digest = hashlib.shake_128(text.encode()).digest(8 * BANDS)
            bands[at] = np.frombuffer(digest, np.uint64)
    return bands


def find_duplicates(
    tasks: Sequence[Task], directory: Path, counts: Sequence[int], near: bool, path: Path
) -> None:
    """Write the verdicts on all documents, uint8 [all documents], task after task.

    Args:
        tasks: all tasks, in order.
        directory: directory of the fingerprints.
        counts: number of documents of each task.
        near: also find near-duplicates.
        path: file to write.
    """
    total = sum(counts)
    unfinished = temporary(path)
    with unfinished.open("wb") as file:
        if total:  # not sparse: on a full disk, writing into the map would kill the process
            os.posix_fallocate(file.fileno(), 0, total)
        sync(file.fileno())
    if total:
        verdicts = np.memmap(unfinished, mode="r+", dtype=np.uint8)
        _mark_exact(verdicts, lambda: _read(tasks, directory, counts, "exact"))
        if near:
            _mark_near(verdicts, lambda band: _read(tasks, directory, counts, "near", band))
        verdicts.flush()
    publish(unfinished, path)


def _read(
    tasks: Sequence[Task], directory: Path, counts: Sequence[int], kind: str, band: int = 0
) -> Iterator[Hashes]:
    """Yield each task's exact hashes [documents, 2], or those of a band [documents, 1].

    The caller has to copy them, since a map keeps its file open.
    """
    width = 2 if kind == "exact" else 1
    for task, count in zip(tasks, counts, strict=True):
        path = fingerprint_path(directory, task, kind)
        if count:
            try:
                yield np.memmap(path, np.uint64, "r", 8 * count * band, (count, width))
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path}: {error}") from error


def _mark_exact(verdicts: NDArray[np.uint8], fingerprints: Callable[[], Iterator[Hashes]]) -> None:
    """Mark exact duplicates, working on a part of all hash values at a time."""
    parts = -(-len(verdicts) // SORTED_AT_ONCE)
    for part in range(parts):
        first, places, hashes = 0, [], []
        for values in fingerprints():
            chosen = np.flatnonzero(values[:, 0] % np.uint64(parts) == part)
            places.append(chosen + first)
            hashes.append(np.array(values[chosen]))
            first += len(values)
        place, found = np.concatenate(places), np.concatenate(hashes)
        order = np.lexsort((found[:, 0], found[:, 1]))  # stable: earlier documents first
        found = found[order]
        again = (found[1:] == found[:-1]).all(axis=1)
        verdicts[place[order[1:][again]]] = EXACT


def _mark_near(verdicts: NDArray[np.uint8], read: Callable[[int], Iterator[Hashes]]) -> None:
    """Mark near-duplicates: all documents but the first of each connected group."""
    leader = np.arange(len(verdicts))
    changed = True
    while changed:
        changed = False
        for band in range(BANDS):
            values = np.concatenate([part[:, 0].copy() for part in read(band)])
            order = np.argsort(values, kind="stable")
            values = values[order]
            starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
            sizes = np.diff(np.append(starts, len(values)))
            several = np.repeat(sizes > 1, sizes)
            members = order[several]
            if not members.size:
                continue
            sizes = sizes[sizes > 1]
            starts = np.cumsum(sizes) - sizes
            lowest = np.repeat(np.minimum.reduceat(leader[members], starts), sizes)
            changed |= bool((lowest < leader[members]).any())
            leader[members] = np.minimum(lowest, leader[members])
    follows = (leader < np.arange(len(leader))) & (verdicts == KEEP)
    verdicts[follows] = NEAR
