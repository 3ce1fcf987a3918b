"""Make one shard: the token ids of a task's documents, and a manifest that says what they are.

    NAME_KEY_document.bin, .idx   an indexed dataset for each key
    NAME.json                     the manifest, written last: a shard without one does not exist
    ../PREFIX_rejects/NAME.jsonl  bad lines, if any: file, line, reason, content

Everything is written under temporary names, synced and renamed, after the manifest and indices of
an older version are gone: whatever a crash leaves cannot be opened, or is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_slm.data.contamination import Contamination
from megatron_slm.data.documents import Batch, Wanted, read_documents
from megatron_slm.data.duplicates import EXACT, KEEP, Verdicts
from megatron_slm.data.engines import Encode, version
from megatron_slm.data.indexed_format import length_blocks, token_dtype, write_index
from megatron_slm.data.inputs import Task
from megatron_slm.data.layout import Layout
from megatron_slm.data.lines import InputHash
from megatron_slm.data.manifest import describe_input, write_manifest
from megatron_slm.data.manifest_types import Counts
from megatron_slm.data.progress import Progress
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sha256_of, sync, temporary

COUNTS = tuple(Counts.__annotations__)
LISTED = 100_000  # rejects of a shard; a bomb has them by the billion


@dataclass(frozen=True)
class Recipe:
    """How documents become token ids: what a worker is told once.

    Attributes:
        engine: the name of what encodes.
        before, after: ids put around every document.
        options: what is written into manifests; a shard made with other ones is made again.
    """

    wanted: Wanted
    encode: Encode
    engine: str
    vocab_size: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    contamination: Contamination | None
    options: dict[str, Any]


class PairWriter:
    """An indexed dataset in the making.  Lengths are spooled to disk."""

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
        """Documents of these lengths, none of them 0.

        Raises:
            UserError: an id that is not in the vocabulary.
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

    def finish(self) -> dict[str, Any]:
        """Publish the pair; returns its part of the manifest."""
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
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bin": {"size": self.tokens * self.dtype.itemsize, "sha256": self.digest.hexdigest()},
            "idx": {"size": size, "sha256": idx_digest},
        }

    def discard(self) -> None:
        """Remove what was not published."""
        for file, path in ((self.bin_file, self.bin), (self.lengths_file, self.lengths)):
            file.close()
            path.unlink(missing_ok=True)


def shard_prefix(directory: Path, name: str, key: str) -> Path:
    """Of the .bin and .idx of a task of this name."""
    return directory / f"{name}_{key}_document"


def remove_shard(layout: Layout, name: str) -> None:
    """Remove a shard, in an order that never leaves an index over other data."""
    (layout.shards / f"{name}.json").unlink(missing_ok=True)
    (layout.rejects / f"{name}.jsonl").unlink(missing_ok=True)
    for key in layout.keys:
        prefix = shard_prefix(layout.shards, name, key)
        for suffix in (".idx", ".bin"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def make_shard(
    task: Task,
    layout: Layout,
    recipe: Recipe,
    verdicts: Verdicts | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write a task's shard; returns its manifest.

    Args:
        verdicts: on the task's documents; None keeps all.

    Raises:
        UserError: an input is damaged or is not what the verdicts are on, or the disk is full.
    """
    try:
        remove_shard(layout, task.name)
        prefixes = [shard_prefix(layout.shards, task.name, key) for key in layout.keys]
        writers = [PairWriter(prefix, recipe.vocab_size) for prefix in prefixes]
        try:
            return _write_shard(task, layout, recipe, verdicts, writers, progress)
        finally:
            for writer in writers:
                writer.discard()
    except OSError as error:
        raise UserError(f"cannot write shard {task.name} in {layout.shards}: {error}") from error


def _write_shard(
    task: Task,
    layout: Layout,
    recipe: Recipe,
    verdicts: Verdicts | None,
    writers: list[PairWriter],
    progress: Progress,
) -> dict[str, Any]:
    counts = dict.fromkeys(COUNTS, 0)
    rejects = layout.rejects / f"{task.name}.jsonl"
    unfinished = temporary(rejects)
    inputs = []
    with unfinished.open("wb") as rejects_file:
        for at, piece in enumerate(task.pieces):
            seen = InputHash(lambda size: progress(size, 0, 0, 0))
            for batch in read_documents(piece, recipe.wanted, seen):
                counts["blank_lines"] += batch.blank_lines
                counts["filtered"] += batch.filtered
                for reject in batch.rejects[: max(0, LISTED - counts["rejects"])]:
                    rejects_file.write(orjson.dumps(reject, option=orjson.OPT_APPEND_NEWLINE))
                counts["rejects"] += len(batch.rejects)
                kept = list(_kept(batch, recipe, verdicts, counts))
                counts["read"] += len(batch.texts)
                _write_batch(kept, recipe, writers, counts, progress, piece.path)
            digest = seen.digest.hexdigest()
            if verdicts is not None and digest != verdicts.inputs[at]:
                raise UserError(
                    f"{piece.path} has changed since its duplicates were looked for: run again "
                    "when nothing writes to it"
                )
            inputs.append(describe_input(piece, digest))
        rejects_file.flush()
        sync(rejects_file.fileno())
    if counts["rejects"]:
        publish(unfinished, rejects)
    else:
        unfinished.unlink()
    outputs = {key: writer.finish() for key, writer in zip(layout.keys, writers, strict=True)}
    manifest = {
        "name": task.name,
        "inputs": inputs,
        "options": recipe.options,
        "engine": recipe.engine,
        "engine_version": version(recipe.engine),
        "dropped": None if verdicts is None else verdicts.sha256,
        "counts": counts,
        "outputs": outputs,
    }
    write_manifest(layout.shards / f"{task.name}.json", manifest)
    return manifest


def _kept(
    batch: Batch, recipe: Recipe, verdicts: Verdicts | None, counts: dict[str, int]
) -> Iterator[tuple[str, ...]]:
    """Documents that are neither duplicates nor contaminated.  Those beyond the verdicts are of a
    file that has changed, which is found out at its end."""
    if verdicts is None and recipe.contamination is None:
        yield from batch.texts
        return
    dropped = np.empty(0, np.uint8) if verdicts is None else verdicts.dropped
    for at, texts in enumerate(batch.texts, counts["read"]):
        verdict = dropped[at] if at < len(dropped) else KEEP
        if verdict != KEEP:
            counts["exact_duplicates" if verdict == EXACT else "near_duplicates"] += 1
        elif recipe.contamination is not None and any(map(recipe.contamination.hit, texts)):
            counts["contaminated"] += 1
        else:
            yield texts


def _write_batch(
    kept: list[tuple[str, ...]],
    recipe: Recipe,
    writers: list[PairWriter],
    counts: dict[str, int],
    progress: Progress,
    path: str,
) -> None:
    before, after = recipe.before, recipe.after
    for column, writer in enumerate(writers):
        texts = [texts[column] for texts in kept]
        ids, lengths = _encode(texts, recipe, path)
        empty = lengths == 0
        lengths = lengths[~empty]
        if before or after:
            ids = surround(ids, lengths, before, after)
            lengths = lengths + len(before) + len(after)
        writer.add(ids, lengths)
        counts["empty"] += int(empty.sum())
        counts["documents"] += len(lengths)
        counts["tokens"] += ids.size
        progress(0, len(lengths), ids.size, sum(map(len, texts)))


def _encode(texts: list[str], recipe: Recipe, path: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    try:
        return recipe.encode(texts)
    except MemoryError:
        raise
    except Exception as error:  # every tokenizer library has its own
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the tokenizer cannot read a document of {path}: {what}") from error


def surround(
    ids: NDArray[Any], lengths: NDArray[np.int64], before: tuple[int, ...], after: tuple[int, ...]
) -> NDArray[Any]:
    """ids [n] of documents of these lengths, with the same ids put around each."""
    ends = np.cumsum(lengths + len(before) + len(after))
    starts = ends - lengths - len(before) - len(after)
    result = np.empty(ids.size + len(lengths) * (len(before) + len(after)), ids.dtype)
    own = np.ones(result.size, bool)
    places = [starts + at for at in range(len(before))]
    places += [ends - len(after) + at for at in range(len(after))]
    for place, token in zip(places, (*before, *after), strict=True):
        result[place] = token
        own[place] = False
    result[own] = ids
    return result
