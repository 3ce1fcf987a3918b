"""Manifests: what a shard or dataset was made from, how, and what it holds.

A shard is made again unless its manifest has today's options and inputs.  An input counts as the
same if its path, size and time are, or else its content by SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson

from megatron_slm.data.manifest_types import DatasetManifest, ShardManifest
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, read_bounded, write_whole

MANIFEST_FORMAT = 1
LARGEST_MANIFEST = 1 << 30  # bytes: a million input files


def manifest_path(prefix: Path | str) -> Path:
    """Of a dataset."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    write_whole(
        path, orjson.dumps({"format": MANIFEST_FORMAT, **content}, option=orjson.OPT_INDENT_2)
    )


def write_data_args(prefix: Path | str, weights: Mapping[str, int]) -> None:
    """Write PREFIX.data-args.txt for Megatron's --data-args-path, whole or not at all.

    Args:
        weights: of the datasets, by prefix.
    """
    lines = (f"{weight} {path}\n" for path, weight in weights.items())
    write_whole(Path(f"{prefix}.data-args.txt"), "".join(lines).encode())


def manifest_of_pair(prefix: Path) -> dict[str, Any] | None:
    """Return that beside a pair of files: of a dataset, or of a shard that was not merged.

    Raises:
        UserError: it is damaged, or of a dataset that is no pair of files.
    """
    manifest = dataset_manifest(prefix)
    if manifest is not None and not manifest["merged"]:
        raise no_pair(prefix)
    if manifest is not None or not prefix.parent.name.endswith("_shards"):
        return manifest
    words = prefix.name.removesuffix("_document").split("_")
    for at in range(1, len(words)):  # NAME_KEY, of which both may have underscores
        name, key = "_".join(words[:at]), "_".join(words[at:])
        shard = read_manifest(prefix.with_name(f"{name}.json"), ShardManifest)
        if shard is not None and key in shard["outputs"]:
            output = shard["outputs"][key]
            return shard | output | {"merged": True, "shards": [shard | {"outputs": {key: output}}]}
    return None


def no_pair(prefix: Path | str) -> UserError:
    """Return what to say of a dataset that was not merged, or a mix."""
    return UserError(
        f"{prefix} is no pair of files but a list of several: train with --data-args-path "
        f"{prefix}.data-args.txt, or verify the datasets in it"
    )


def dataset_manifest(prefix: Path | str) -> dict[str, Any] | None:
    """Return that of a dataset, whose parts make up the whole; None if there is none.

    Raises:
        UserError: it is damaged, or of a mix.
    """
    path = manifest_path(prefix)
    manifest = read_manifest(path, DatasetManifest)
    if manifest is not None:
        check_dataset(path, manifest)
    return manifest


def check_dataset(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a dataset's manifest whose shards do not make up what it says of the dataset.

    Raises:
        UserError: they do not; says how.
    """
    shards = manifest["shards"]
    outputs = [output for shard in shards for output in shard["outputs"].values()]
    keys = {key for shard in shards for key in shard["outputs"]}
    sizes = sum(output["bin"]["size"] for output in outputs)
    totals = {name: sum(output[name] for output in outputs) for name in manifest["counts"]}
    fault = None
    if manifest["merged"] and not manifest.keys() >= {"bin", "idx"}:
        fault = f"Object missing required field `{'idx' if 'bin' in manifest else 'bin'}`"
    elif len(keys) > 1 or not all(keys <= set(shard["options"]["json_keys"]) for shard in shards):
        fault = f"its shards are of other keys: {', '.join(sorted(keys))}"
    elif any(part["start"] > part["end"] for shard in shards for part in shard["inputs"]):
        fault = "a part of its inputs begins behind its end"
    elif totals != manifest["counts"] or totals["documents"] == 0:
        fault = f"its counts are {manifest['counts']}, but its shards have {totals}"
    elif manifest["merged"] and sizes != manifest["bin"]["size"]:
        fault = f"its .bin has {manifest['bin']['size']} bytes, but its shards have {sizes}"
    if fault is not None:
        raise UserError(f"{path} is damaged: {fault}; delete it and write the dataset again")


def read_manifest(path: Path, kind: type[Any]) -> dict[str, Any] | None:
    """Return a manifest of a kind of manifest_types.py; None if there is none.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    manifest = written_manifest(path)
    if manifest is not None:
        if kind is DatasetManifest and "recipe" in manifest:
            raise no_pair(str(path).removesuffix(".manifest.json"))
        try:
            msgspec.convert(manifest, kind)
        except msgspec.ValidationError as error:
            raise UserError(f"{path} is damaged: {error}; delete it and run again") from error
    return manifest


def written_manifest(path: Path) -> dict[str, Any] | None:
    """Return what is in a manifest of any kind; None if there is none.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    try:
        manifest = decode_json(read_bounded(path, LARGEST_MANIFEST), dict[str, Any], path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise UserError(f"{error}; it is damaged: delete it and run again") from error
    if manifest.pop("format", None) != MANIFEST_FORMAT:
        raise UserError(
            f"{path} is not a manifest of format {MANIFEST_FORMAT}; delete it and run again"
        )
    return manifest
