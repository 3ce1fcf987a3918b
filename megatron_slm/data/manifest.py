"""Manifests: what a shard or dataset was made from, how, and what it holds.

A shard is made again unless its manifest has today's options and inputs.  An input counts as the
same if its path, size and time are, or else its content by SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_slm.data.inputs import Piece, Task
from megatron_slm.data.lines import hash_piece
from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

FORMAT = 1


def manifest_path(prefix: Path | str) -> Path:
    """Of a dataset."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    write_whole(path, orjson.dumps({"format": FORMAT, **content}, option=orjson.OPT_INDENT_2))


def write_data_args(prefix: Path | str, weights: Mapping[str, int]) -> None:
    """Write PREFIX.data-args.txt for Megatron's --data-args-path, whole or not at all.

    Args:
        weights: of the datasets, by prefix.
    """
    lines = (f"{weight} {path}\n" for path, weight in weights.items())
    write_whole(Path(f"{prefix}.data-args.txt"), "".join(lines).encode())


def manifest_of_pair(prefix: Path) -> dict[str, Any] | None:
    """That beside a pair of files: of a dataset, or of a shard that was not merged."""
    manifest = read_manifest(manifest_path(prefix))
    if manifest is not None or not prefix.parent.name.endswith("_shards"):
        return manifest
    words = prefix.name.removesuffix("_document").split("_")
    for at in range(1, len(words)):  # NAME_KEY, of which both may have underscores
        name, key = "_".join(words[:at]), "_".join(words[at:])
        shard = read_manifest(prefix.with_name(f"{name}.json"))
        if shard is not None and key in shard["outputs"]:
            output = shard["outputs"][key]
            return shard | output | {"merged": True, "shards": [shard | {"outputs": {key: output}}]}
    return None


def read_manifest(path: Path) -> dict[str, Any] | None:
    """None if there is none.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; delete it and run again") from error
    if not isinstance(manifest, dict) or manifest.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a manifest of format {FORMAT}; delete it and run again")
    return manifest


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
