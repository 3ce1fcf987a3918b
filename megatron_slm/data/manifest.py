"""Read and write manifests of datasets and mixes, which say what they hold and were made from.

A shard is made again unless its manifest has this run's options and inputs.  An input counts as the
same if its path, size and time are the same, or if its content has the same SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from megatron_slm.data.manifest_types import DatasetManifest, PairManifest, ShardManifest
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, read_bounded, write_whole, writing

MANIFEST_FORMAT = 1
LARGEST_MANIFEST = 1 << 30  # bytes: a million input files


def manifest_path(prefix: Path | str) -> Path:
    """Return the path of a dataset's or mix's manifest."""
    return Path(f"{prefix}.manifest.json")


def encode_manifest(content: msgspec.Struct) -> bytes:
    """Return a manifest as its file has it."""
    written = {"format": MANIFEST_FORMAT, **msgspec.to_builtins(content)}
    return orjson.dumps(written, option=orjson.OPT_INDENT_2)


def write_manifest(path: Path, content: msgspec.Struct) -> None:
    """Write a manifest, completely or not at all."""
    write_whole(path, encode_manifest(content))


def write_data_args(
    prefix: Path | str, weights: Mapping[str, int], other: Path | None = None
) -> None:
    """Write PREFIX.data-args.txt for Megatron's --data-args-path, completely or not at all.

    Args:
        prefix: the path without .data-args.txt.
        weights: weights of the datasets, by prefix.
        other: the manifest of an older list, which is removed before this one replaces it.
    """
    lines = (f"{weight} {path}\n" for path, weight in weights.items())
    with writing(Path(f"{prefix}.data-args.txt")) as unfinished:
        unfinished.write_bytes("".join(lines).encode())
        if other is not None:
            other.unlink(missing_ok=True)


def manifest_of_pair(prefix: Path) -> PairManifest | None:
    """Return the manifest of a pair of files, which is a dataset or a shard that was not merged.

    Raises:
        UserError: the manifest is damaged, or belongs to a dataset that is not a pair of files.
    """
    manifest = read_dataset_manifest(prefix)
    if manifest is not None:
        if manifest.pair is None:
            raise no_pair(prefix)
        return manifest.pair
    if not prefix.parent.name.endswith("_shards"):
        return None
    words = prefix.name.removesuffix("_document").split("_")
    for at in range(1, len(words)):  # NAME_KEY, of which both may have underscores
        name, key = "_".join(words[:at]), "_".join(words[at:])
        shard = read_manifest(prefix.with_name(f"{name}.json"), ShardManifest)
        if shard is not None and key in shard.outputs:
            return PairManifest.of_shard(shard, key)
    return None


def no_pair(prefix: Path | str) -> UserError:
    """Return the error about a dataset that was not merged, or a mix."""
    return UserError(
        f"{prefix} is no pair of files but a list of several: train with --data-args-path "
        f"{prefix}.data-args.txt, or verify the datasets in it"
    )


def read_dataset_manifest(prefix: Path | str) -> DatasetManifest | None:
    """Return the manifest of a dataset; None if there is none.

    Raises:
        UserError: the manifest is damaged, or belongs to a mix.
    """
    path = manifest_path(prefix)
    content = _read(path)
    if content is not None and "recipe" in content:
        raise no_pair(prefix)
    return _typed(path, content, DatasetManifest)


def is_mix(path: Path) -> bool:
    """Return whether there is a manifest that belongs to a mix.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    return "recipe" in (_read(path) or {})


def read_manifest[T: msgspec.Struct](path: Path, kind: type[T]) -> T | None:
    """Read a manifest of one of the types in manifest_types.py; return None if there is none.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    return _typed(path, _read(path), kind)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = decode_json(read_bounded(path, LARGEST_MANIFEST), dict[str, Any], path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error.__cause__, OSError):  # of a disk or a permission: it may be whole
            raise
        raise UserError(f"{error}; it is damaged: delete it and run again") from error
    if content.pop("format", None) != MANIFEST_FORMAT:
        raise UserError(
            f"{path} is not a manifest of format {MANIFEST_FORMAT}; delete it and run again"
        )
    return content


def _typed[T: msgspec.Struct](
    path: Path, content: dict[str, Any] | None, kind: type[T]
) -> T | None:
    try:
        return None if content is None else msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged: {error}; delete it and run again") from error
