"""What manifests record of inputs and options, by which a later run tells whether they changed."""

from __future__ import annotations

from typing import Any

from megatron_slm.corpus.reading.inputs import Piece, Task
from megatron_slm.corpus.reading.lines import hash_piece


def describe_input(piece: Piece, sha256: str) -> dict[str, Any]:
    """A piece in a manifest."""
    return {
        "path": piece.path,
        "size": piece.size,
        "modified": piece.modified,
        "start": piece.start,
        "end": piece.end,
        "sha256": sha256,
    }


def same_inputs(task: Task, recorded: list[dict[str, Any]]) -> bool:
    """Whether a manifest's inputs are the task's."""
    return len(recorded) == len(task.pieces) and all(
        (before["start"], before["end"]) == (piece.start, piece.end)
        and (
            (before["path"], before["size"], before["modified"])
            == (piece.path, piece.size, piece.modified)
            or before["sha256"] == hash_piece(piece)
        )
        for before, piece in zip(recorded, task.pieces, strict=True)
    )


def what_changed(
    task: Task, options: dict[str, Any], manifest: dict[str, Any], engine: str = "auto"
) -> str | None:
    """Why a shard has to be made again, or None.  engine: that it is to be made by; auto: any."""
    recorded = manifest["options"]
    changed = sorted(
        name for name in {*options, *recorded} if options.get(name) != recorded.get(name)
    )
    if changed:
        return f"other {', '.join(changed).replace('_', ' ')}"
    if engine != "auto" and engine != manifest["engine"]:
        return f"made by {manifest['engine']}"
    return None if same_inputs(task, manifest["inputs"]) else "its input has changed"
