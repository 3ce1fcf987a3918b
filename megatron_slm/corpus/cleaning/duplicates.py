"""Which documents repeat an earlier one, over all shards.

    fingerprint   each task, in parallel: a hash of every document, and its MinHash bands
    verdicts      one process: sorts them; the first of equal documents, in input order, is kept
    tokenize      each task drops what the verdicts say

So a corpus is read twice, and the result does not depend on the number of workers.  Exact
duplicates have the same text, to 128 bits.  Near-duplicates share one of 14 bands of 8 MinHash
values of their runs of 5 words (FineWeb's setting: of pairs of Jaccard similarity 0.8 it finds
92%, at 0.5 it takes 5%); of each group so connected one is kept.  Memory: about 1 GB for exact
ones at any size; for near ones 50 bytes a document.  One file is open at a time.
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
    """On a task's documents.

    Attributes:
        dropped: uint8 [documents]: KEEP, EXACT or NEAR.
        inputs: SHA-256 of the task's pieces as the documents were found in them.
    """

    dropped: NDArray[np.uint8]
    inputs: Sequence[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.dropped.tobytes()).hexdigest()


def fingerprint_path(directory: Path, task: Task, kind: str) -> Path:
    """kind: exact [documents, 2], near [BANDS, documents] or json, the manifest; rows is near as it
    is found, [documents, BANDS]."""
    return directory / f"{task.name}.fingerprints.{kind}"


def fingerprint_documents(
    task: Task, directory: Path, wanted: Wanted, options: ReadingOptions, progress: Progress
) -> Fingerprints:
    """Write a task's fingerprints; returns their manifest.

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
    """Hashes [documents, BANDS] as [BANDS, documents]: the search reads a band at a time."""
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
    """128 bits."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def band_hashes(texts: Sequence[str]) -> Hashes:
    """[texts, BANDS].  Texts of fewer than WORDS words share no band with any other."""
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
        counts: documents of each task.
    """
    total = sum(counts)
    unfinished = temporary(path)
    with unfinished.open("wb") as file:
        if total:  # not as a hole: on a full disk, to write into a map would end the process
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
    """Exact hashes [documents, 2] of task after task, or those of a band [documents, 1], for the
    caller to copy from: a map holds its file open."""
    width = 2 if kind == "exact" else 1
    for task, count in zip(tasks, counts, strict=True):
        path = fingerprint_path(directory, task, kind)
        if count:
            try:
                yield np.memmap(path, np.uint64, "r", 8 * count * band, (count, width))
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {path}: {error}") from error


def _mark_exact(verdicts: NDArray[np.uint8], fingerprints: Callable[[], Iterator[Hashes]]) -> None:
    """A part of all hash values at a time."""
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
    """Each document's leader becomes the first of those it is connected with; others go."""
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
