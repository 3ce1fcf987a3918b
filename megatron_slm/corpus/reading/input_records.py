"""Record inputs and options in manifests, so that later runs can tell whether they changed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_slm.corpus.reading.inputs import Piece, Task
from megatron_slm.corpus.reading.lines import hash_piece
from megatron_slm.data.manifest_types import Fingerprints, InputPart, ReadingOptions, ShardManifest


def describe_input(piece: Piece, sha256: str) -> InputPart:
    """Return a piece as manifests record it.

    Args:
        piece: part of an input file.
        sha256: hash of its bytes.
    """
    return InputPart(piece.path, piece.size, piece.modified, piece.start, piece.end, sha256)


def same_inputs(task: Task, recorded: Sequence[InputPart]) -> bool:
    """Return whether the inputs that a manifest records are those of a task."""
    return len(recorded) == len(task.pieces) and all(
        (before.start, before.end) == (piece.start, piece.end)
        and (
            (before.path, before.size, before.modified) == (piece.path, piece.size, piece.modified)
            or before.sha256 == hash_piece(piece)
        )
        for before, piece in zip(recorded, task.pieces, strict=True)
    )


def what_changed(
    task: Task,
    options: ReadingOptions,
    manifest: ShardManifest | Fingerprints,
    engine: str = "auto",
) -> str | None:
    """Return why the output that a manifest describes has to be made again; None if it need not be.

    Args:
        task: the task that makes the output.
        options: options of this run.
        manifest: manifest of the output.
        engine: engine that has to have made a shard; auto for any.
    """
    recorded = manifest.options
    changed = sorted(
        name
        for name in options.__struct_fields__
        if getattr(options, name) != getattr(recorded, name)
    )
    if changed:
        return f"other {', '.join(changed).replace('_', ' ')}"
    if engine != "auto" and isinstance(manifest, ShardManifest) and engine != manifest.engine:
        return f"made by {manifest.engine}"
    return None if same_inputs(task, manifest.inputs) else "its input has changed"
