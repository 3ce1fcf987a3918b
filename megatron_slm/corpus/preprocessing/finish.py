"""Shards to a dataset: one pair of files, or a list of the shards' pairs with their weights.

PREFIX_KEY_document.bin, .idx        the dataset; the shards are removed then, for the manifest
                                     says which of its documents came from where, and a later
                                     run takes from it what has not changed
PREFIX_KEY_document.data-args.txt    instead of these if not merged: for --data-args-path
PREFIX_KEY_document.manifest.json    written last
PREFIX_shards/                       shards in the making
PREFIX_rejects/                      lines that could not be used
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.corpus.file_names import is_ours
from megatron_slm.corpus.indexed.merge import DocumentRange, merge
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.settle import settle
from megatron_slm.corpus.preprocessing.shard import COUNTS, remove_shard, shard_prefix
from megatron_slm.corpus.reading.input_records import what_changed
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.data.indexed_format import token_dtype
from megatron_slm.data.manifest import (
    check_dataset,
    dataset_manifest,
    manifest_path,
    read_manifest,
    write_data_args,
    write_manifest,
)
from megatron_slm.data.manifest_types import Decided, Reject, ShardManifest
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, open_regular

MOST_IN_A_BLEND = 32766
LONGEST_REJECT = 1 << 20  # bytes of a line of a list of rejects


@dataclass(frozen=True)
class PreprocessingSummary:
    """datasets: manifests by key."""

    layout: OutputPaths
    datasets: dict[str, dict[str, Any]]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Their manifests, with the counts over all keys."""
        return self.datasets[self.layout.keys[0]]["shards"]

    @property
    def counts(self) -> dict[str, int]:
        """Over all shards."""
        return total_counts(self.shards)


def shard_manifest(layout: OutputPaths, task: Task) -> dict[str, Any] | None:
    """A finished shard's manifest."""
    path = layout.shards / f"{task.name}.json"
    manifest = read_manifest(path, ShardManifest)
    if manifest is None:
        return None
    keys = set(manifest["options"]["json_keys"])
    if manifest["name"] != task.name or manifest["outputs"].keys() != keys:
        raise UserError(f"{path} is damaged: it is of another shard; delete it and run again")
    for key, output in manifest["outputs"].items():
        if not has_sizes(shard_prefix(layout.shards, task.name, key), output):
            return None
    return manifest


def has_sizes(prefix: Path, output: dict[str, Any]) -> bool:
    """Whether .bin and .idx are as long as a manifest says."""
    files = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
    return all(
        path.exists() and path.stat().st_size == output[suffix]["size"]
        for suffix, path in files.items()
    )


def datasets(layout: OutputPaths) -> dict[str, dict[str, Any]] | None:
    """Manifests of the datasets that are there, or are about to be, if all keys have theirs."""
    decided = read_manifest(layout.decided, Decided)
    if decided is not None:
        for manifest in decided["datasets"].values():
            check_dataset(layout.decided, manifest)
        return decided["datasets"]
    found = {}
    for key in layout.keys:
        manifest = dataset_manifest(layout.dataset(key))
        if manifest is None or (
            manifest["merged"] and not has_sizes(layout.dataset(key), manifest)
        ):
            return None
        found[key] = manifest
    return found


def merged_shards(layout: OutputPaths) -> dict[str, dict[str, Any]]:
    """Shards that are part of merged datasets, by name, with the outputs of all keys."""
    found: dict[str, dict[str, Any]] = {}
    manifests = datasets(layout)
    if manifests is None or not all(manifest["merged"] for manifest in manifests.values()):
        return {}
    for manifest in manifests.values():
        for shard in manifest["shards"]:
            merged = found.setdefault(shard["name"], {**shard, "outputs": {}})
            merged["outputs"] |= shard["outputs"]
    return found


def remove_lists(layout: OutputPaths) -> None:
    """Remove what makes datasets of shards that are not merged, before any of these changes."""
    for key in layout.keys:
        path = manifest_path(layout.dataset(key))
        manifest = dataset_manifest(layout.dataset(key))
        if manifest is None or not manifest["merged"]:
            path.unlink(missing_ok=True)
            Path(f"{layout.dataset(key)}.data-args.txt").unlink(missing_ok=True)


def is_complete(
    layout: OutputPaths, tasks: Sequence[Task], options: dict[str, Any], merged: bool, engine: str
) -> PreprocessingSummary | None:
    """The datasets as they are, if they are what a run would make."""
    manifests = datasets(layout)
    if manifests is None:
        return None
    for manifest in manifests.values():
        shards = manifest["shards"]
        if manifest["merged"] is not merged or len(shards) != len(tasks):
            return None
        for task, shard in zip(tasks, shards, strict=True):
            if shard["name"] != task.name or what_changed(task, options, shard, engine) is not None:
                return None
            if not merged and shard_manifest(layout, task) is None:
                return None
    return PreprocessingSummary(layout, manifests)


def total_counts(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Over all shards."""
    return {name: sum(shard["counts"][name] for shard in shards) for name in COUNTS}


def remove_strangers(layout: OutputPaths, names: set[str]) -> None:
    """Remove what earlier inputs have left, of tasks that are none of this run's."""
    for path in layout.shards.glob("*.json"):
        of_a_shard = not path.stem.endswith((".fingerprints", ".manifest"))
        if of_a_shard and is_ours(path) and path.stem not in names:
            remove_shard(layout, path.stem)
    for path in layout.rejects.glob("*.jsonl"):
        if is_ours(path) and path.stem not in names:
            path.unlink()


def check_rejects(layout: OutputPaths, shards: Sequence[dict[str, Any]], most: float) -> None:
    """Raises: UserError: too large a part of the shards' documents, also those that a filter leaves
    out, could not be used."""
    counts = total_counts(shards)
    rejects = counts["rejects"]
    seen = counts["read"] + counts["filtered"] + rejects
    if rejects > most * seen:
        what = (
            f"{rejects} of {seen} documents could not be used, more than "
            f"--max-reject-fraction {most:g} of them"
        )
        lists = (layout.rejects / f"{shard['name']}.jsonl" for shard in shards)
        first = next(filter(Path.exists, lists), None)
        if first is None:
            raise UserError(f"{what}; their list in {layout.rejects} was removed. Allow more")
        with open_regular(first) as file:
            reject = decode_json(file.readline(LONGEST_REJECT), Reject, first)
        raise UserError(
            f"{what}: {reject['file']}:{reject['line']}: "
            f"{reject['reason']}; all are in {layout.rejects}. Mend them and run again, which "
            "keeps the other shards, or allow more"
        )


def finish(
    layout: OutputPaths,
    shards: Sequence[dict[str, Any]],
    merged_before: set[str],
    options: dict[str, Any],
    most_rejects: float,
    merging: bool,
    workers: int,
) -> PreprocessingSummary:
    """Make datasets of all shards.

    Args:
        shards: their manifests, in order.
        merged_before: names of those that are part of the datasets that are there already.

    Raises:
        UserError: too many rejects, no documents at all, or the disk is full.
    """
    check_rejects(layout, shards, most_rejects)
    found = {}
    for key in layout.keys:
        own = [{**shard, "outputs": {key: shard["outputs"][key]}} for shard in shards]
        outputs = [shard["outputs"][key] for shard in shards]
        totals = {name: sum(output[name] for output in outputs) for name in ("documents", "tokens")}
        if totals["documents"] == 0:
            raise UserError(f"{_why_nothing(key, shards, options)}: nothing to write")
        found[key] = {"options": options, "merged": merging, "counts": totals, "shards": own}
    if merging:
        _merge_all(layout, found, shards, merged_before, workers)
    else:
        _list_all(layout, found, shards)
    remove_strangers(layout, {shard["name"] for shard in shards})
    layout.clear(merging)
    return PreprocessingSummary(layout, found)


def _why_nothing(key: str, shards: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    """Return why no document of any shard has a token under a key."""
    counts = total_counts(shards)
    if counts["filtered"] and not counts["read"]:
        filters = " ".join(f"--filter {name}={value}" for name, value in options["filters"])
        return f"{filters} leaves none of {counts['filtered']:,} documents"
    names = ("filtered", "rejects", "exact_duplicates", "near_duplicates", "contaminated")
    left_out = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts[name]]
    if left_out and not counts["empty"]:
        return f"no document is left under {key!r} ({', '.join(left_out)})"
    return f"no document has any text under {key!r}"


def _merge_all(
    layout: OutputPaths,
    found: dict[str, dict[str, Any]],
    shards: Sequence[dict[str, Any]],
    merged_before: set[str],
    workers: int,
) -> None:
    """Write all datasets before any of the old ones is replaced, as shards may be in these alone.
    Their manifests get what merge finds out."""
    try:
        for key, manifest in found.items():
            parts = _parts(layout, shards, merged_before, key)
            dtype = token_dtype(manifest["options"]["tokenizer"]["vocab_size"])
            manifest.update(merge(layout.dataset(key), parts, dtype, workers))
        write_manifest(layout.decided, {"datasets": found})
    finally:
        settle(layout)


def _list_all(
    layout: OutputPaths, found: dict[str, dict[str, Any]], shards: Sequence[dict[str, Any]]
) -> None:
    """Make lists of the shards the datasets, in the place of older ones."""
    weights = {key: _weights(layout, key, shards) for key in found}
    for key in found:
        prefix = layout.dataset(key)
        for suffix in ("idx", "bin", "manifest.json"):  # of an older, merged one
            Path(f"{prefix}.{suffix}").unlink(missing_ok=True)
        write_data_args(prefix, weights[key])
    for key, manifest in found.items():
        write_manifest(manifest_path(layout.dataset(key)), manifest)


def _parts(
    layout: OutputPaths, shards: Sequence[dict[str, Any]], merged_before: set[str], key: str
) -> list[DocumentRange]:
    """Where each shard's documents are now."""
    old: dict[str, DocumentRange] = {}
    before = dataset_manifest(layout.dataset(key)) if merged_before else None
    first = offset = 0
    for shard in [] if before is None else before["shards"]:
        output = shard["outputs"][key]
        size = output["bin"]["size"]
        old[shard["name"]] = DocumentRange(
            layout.dataset(key), first, output["documents"], offset, size
        )
        first, offset = first + output["documents"], offset + size
    return [
        old[shard["name"]]
        if shard["name"] in merged_before
        else DocumentRange(
            layout.shards / f"{shard['name']}_{key}_document",
            0,
            shard["outputs"][key]["documents"],
            0,
            shard["outputs"][key]["bin"]["size"],
        )
        for shard in shards
    ]


def _weights(layout: OutputPaths, key: str, shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Of the shards by prefix, for Megatron's --data-args-path."""
    weights = {
        str(shard_prefix(layout.shards, shard["name"], key)): shard["outputs"][key]["tokens"]
        for shard in shards
        if shard["outputs"][key]["documents"]
    }
    if len(weights) > MOST_IN_A_BLEND:
        raise UserError(
            f"Megatron blends at most {MOST_IN_A_BLEND} datasets, not {len(weights)}: merge them, "
            "or choose a larger --shard-size"
        )
    return weights
