"""Look once at what earlier runs have left, and tell what of it can still be used.

A task's shard may be in PREFIX_shards or a part of merged datasets.  It can be used if it was made
with this run's options from this run's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.settings import Setup
from megatron_slm.corpus.preprocessing.shard import shard_prefix
from megatron_slm.corpus.reading.input_records import what_changed
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.data.manifest import read_dataset_manifest, read_manifest
from megatron_slm.data.manifest_types import (
    DatasetManifest,
    DecidedDatasets,
    PairManifest,
    ShardManifest,
    ShardOutput,
)
from megatron_slm.errors import UserError


@dataclass(frozen=True)
class Found:
    """What is on the disk before a run changes anything."""

    in_place: dict[str, DatasetManifest | None]
    """The datasets' manifests by key."""
    datasets: dict[str, DatasetManifest] | None
    """The datasets by key, in place or decided on; None unless those of all keys are complete."""
    shards: dict[str, ShardManifest]
    """Shards in PREFIX_shards, of this rank's tasks, by the task's name."""

    @cached_property
    def merged(self) -> dict[str, ShardManifest]:
        """Shards that are part of merged datasets, by name, with the outputs of all keys."""
        datasets = {} if self.datasets is None else self.datasets
        if not all(manifest.merged for manifest in datasets.values()):
            return {}
        found: dict[str, ShardManifest] = {}
        for manifest in datasets.values():
            for shard in manifest.shards:
                before = found.setdefault(shard.name, shard)
                outputs = before.outputs | shard.outputs
                found[shard.name] = msgspec.structs.replace(before, outputs=outputs)
        return found


@dataclass(frozen=True)
class Serving:
    """What can still be used of a task's shard."""

    shard: ShardManifest | None
    """The shard in PREFIX_shards, if it can be used."""
    merged: ShardManifest | None
    """The shard in the merged datasets, if it can be used."""
    changed: str | None
    """Why what is there cannot be used."""


def look(setup: Setup) -> Found:
    """Read the manifests of datasets and of this rank's shards.

    Raises:
        UserError: a manifest is damaged.
    """
    layout = setup.layout
    in_place = {key: read_dataset_manifest(layout.dataset(key)) for key in layout.keys}
    decided = read_manifest(layout.decided, DecidedDatasets)
    datasets = {key: manifest for key, manifest in in_place.items() if manifest is not None}
    whole = len(datasets) == len(layout.keys) and all(
        manifest.pair is None or _has_sizes(layout.dataset(key), manifest.pair)
        for key, manifest in datasets.items()
    )
    if decided is not None:
        datasets, whole = decided.datasets, True
    shards = {
        task.name: manifest
        for task in setup.own
        if (manifest := _finished_shard(layout, task)) is not None
    }
    return Found(in_place, datasets if whole else None, shards)


def _finished_shard(layout: OutputPaths, task: Task) -> ShardManifest | None:
    path = layout.shards / f"{task.name}.json"
    manifest = read_manifest(path, ShardManifest)
    if manifest is None:
        return None
    if manifest.name != task.name or manifest.outputs.keys() != set(manifest.options.json_keys):
        raise UserError(f"{path} is damaged: it is of another shard; delete it and run again")
    whole = all(
        _has_sizes(shard_prefix(layout.shards, task.name, key), output)
        for key, output in manifest.outputs.items()
    )
    return manifest if whole else None


def _has_sizes(prefix: Path, recorded: ShardOutput | PairManifest) -> bool:
    """Return whether .bin and .idx are as long as a manifest says."""
    sizes = {"bin": recorded.bin.size, "idx": recorded.idx.size}
    files = {Path(f"{prefix}.{suffix}"): size for suffix, size in sizes.items()}
    return all(path.exists() and path.stat().st_size == size for path, size in files.items())


def serving(setup: Setup, found: Found) -> dict[str, Serving]:
    """Return what can be used of each of this rank's tasks, by its name."""
    merged = found.merged if setup.settings.merge else {}
    return {
        task.name: _serving(setup, task, found.shards.get(task.name), merged.get(task.name))
        for task in setup.own
    }


def _serving(
    setup: Setup, task: Task, shard: ShardManifest | None, merged: ShardManifest | None
) -> Serving:
    in_shards, in_dataset = (
        None if there is None else what_changed(task, setup.options, there, setup.settings.engine)
        for there in (shard, merged)
    )
    return Serving(
        None if in_shards else shard, None if in_dataset else merged, in_dataset or in_shards
    )


def complete_datasets(
    setup: Setup, found: Found, serves: dict[str, Serving]
) -> dict[str, DatasetManifest] | None:
    """Return the datasets that exist, by key, if they are what this run would make; else None."""
    if found.datasets is None:
        return None
    names = [task.name for task in setup.tasks]
    for manifest in found.datasets.values():
        if manifest.merged is not setup.settings.merge:
            return None
        if [shard.name for shard in manifest.shards] != names:
            return None
    if setup.settings.merge:
        return found.datasets if all(each.merged is not None for each in serves.values()) else None
    for key, manifest in found.datasets.items():
        for recorded in manifest.shards:
            shard = serves[recorded.name].shard
            if shard is None or shard.of_key(key) != recorded:
                return None
    return found.datasets
