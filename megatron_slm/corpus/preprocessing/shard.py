"""Make a shard: the token ids of a task's documents, and a manifest that describes them.

    NAME_KEY_document.bin, .idx   an indexed dataset for each key
    NAME.json                     the manifest, written last: a shard without one does not exist
    ../PREFIX_rejects/NAME.jsonl  bad lines, if any: file, line, reason, content

Everything is written under temporary names, synced and renamed, after the manifest and indices of
an older version have been removed.  So what a crash leaves is complete or cannot be opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.cleaning.contamination import Contamination
from megatron_slm.corpus.cleaning.duplicates import EXACT, KEEP, Verdicts
from megatron_slm.corpus.indexed.pair_writer import PairWriter
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.progress import Progress
from megatron_slm.corpus.reading.documents import Batch, Wanted, read_documents
from megatron_slm.corpus.reading.input_records import describe_input
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.corpus.reading.lines import InputHash
from megatron_slm.corpus.tokenizers.engines import Encode, surround, version
from megatron_slm.data.manifest import write_manifest
from megatron_slm.data.manifest_types import (
    DocumentCounts,
    ShardManifest,
    ShardOptions,
    total_counts,
)
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sync, temporary

LISTED = 100_000  # rejects of a shard; a malicious file could have billions


@dataclass(frozen=True)
class ShardRecipe:
    """How documents become token ids."""

    wanted: Wanted
    """Which records to take, and which texts in them."""
    encode: Encode
    """Function from texts to ids."""
    engine: str
    """Name of the engine that encodes."""
    vocab_size: int
    """Number of tokens of the vocabulary."""
    before: tuple[int, ...]
    """Ids put before each document."""
    after: tuple[int, ...]
    """Ids put after each document."""
    contamination: Contamination | None
    """What documents must not contain."""
    options: ShardOptions
    """What manifests record; a shard made with other options is made again."""


def shard_prefix(directory: Path, name: str, key: str) -> Path:
    """Return the path, without .bin and .idx, of a task's dataset for a key."""
    return directory / f"{name}_{key}_document"


def remove_shard(layout: OutputPaths, name: str) -> None:
    """Remove a shard, in an order that never leaves an index beside other data."""
    (layout.shards / f"{name}.json").unlink(missing_ok=True)
    (layout.rejects / f"{name}.jsonl").unlink(missing_ok=True)
    for key in layout.keys:
        prefix = shard_prefix(layout.shards, name, key)
        for suffix in (".idx", ".bin"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)


def make_shard(
    task: Task,
    layout: OutputPaths,
    recipe: ShardRecipe,
    verdicts: Verdicts | None,
    progress: Progress,
) -> ShardManifest:
    """Write a task's shard, and return its manifest.

    Args:
        task: the task.
        layout: where the files go.
        recipe: how documents become token ids.
        verdicts: the verdicts on the task's documents; None keeps all.
        progress: function that is told of progress.

    Raises:
        UserError: an input is damaged or has changed since the verdicts, or the disk is full.
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
    layout: OutputPaths,
    recipe: ShardRecipe,
    verdicts: Verdicts | None,
    writers: list[PairWriter],
    progress: Progress,
) -> ShardManifest:
    counts = total_counts([])
    rejects = layout.rejects / f"{task.name}.jsonl"
    unfinished = temporary(rejects)
    inputs = []
    with unfinished.open("wb") as rejects_file:
        for at, piece in enumerate(task.pieces):
            seen = InputHash(lambda size: progress(size, 0, 0, 0))
            for batch in read_documents(piece, recipe.wanted, seen):
                counts.blank_lines += batch.blank_lines
                counts.filtered += batch.filtered
                for reject in batch.rejects[: max(0, LISTED - counts.rejects)]:
                    rejects_file.write(msgspec.json.encode(reject) + b"\n")
                counts.rejects += len(batch.rejects)
                kept = list(_kept(batch, recipe, verdicts, counts))
                counts.read += len(batch.texts)
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
    if counts.rejects:
        publish(unfinished, rejects)
    else:
        unfinished.unlink()
    outputs = {key: writer.finish() for key, writer in zip(layout.keys, writers, strict=True)}
    manifest = ShardManifest(
        name=task.name,
        inputs=inputs,
        options=recipe.options,
        engine=recipe.engine,
        engine_version=version(recipe.engine),
        dropped=None if verdicts is None else verdicts.sha256,
        counts=counts,
        outputs=outputs,
    )
    write_manifest(layout.shards / f"{task.name}.json", manifest)
    return manifest


def _kept(
    batch: Batch, recipe: ShardRecipe, verdicts: Verdicts | None, counts: DocumentCounts
) -> Iterator[tuple[str, ...]]:
    """Yield the documents that are neither duplicates nor contaminated.

    If there are more documents than verdicts, the file has changed; that is reported at its end.
    """
    if verdicts is None and recipe.contamination is None:
        yield from batch.texts
        return
    dropped = np.empty(0, np.uint8) if verdicts is None else verdicts.dropped
    for at, texts in enumerate(batch.texts, counts.read):
        verdict = dropped[at] if at < len(dropped) else KEEP
        if verdict != KEEP:
            counts.exact_duplicates += int(verdict == EXACT)
            counts.near_duplicates += int(verdict != EXACT)
        elif recipe.contamination is not None and any(map(recipe.contamination.hit, texts)):
            counts.contaminated += 1
        else:
            yield texts


def _write_batch(
    kept: list[tuple[str, ...]],
    recipe: ShardRecipe,
    writers: list[PairWriter],
    counts: DocumentCounts,
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
        counts.empty += int(empty.sum())
        counts.documents += len(lengths)
        counts.tokens += ids.size
        progress(0, len(lengths), ids.size, sum(map(len, texts)))


def _encode(
    texts: list[str], recipe: ShardRecipe, path: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    try:
        return recipe.encode(texts)
    except MemoryError:
        raise
    except Exception as error:  # every tokenizer library has its own
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the tokenizer cannot read a document of {path}: {what}") from error
