"""Turn shards into a dataset: one pair of files, or a list of the shards' pairs with weights.

PREFIX_KEY_document.bin, .idx        the dataset; the shards are then removed, since the manifest
                                     says where its documents came from, and a later run can
                                     take from it what has not changed
PREFIX_KEY_document.data-args.txt    without merging, the list for --data-args-path instead
PREFIX_KEY_document.manifest.json    written last
PREFIX_shards/                       shards, while they are made
PREFIX_rejects/                      lines that could not be used
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.corpus.file_names import is_ours
from megatron_slm.corpus.indexed.merge import DocumentRange, merge
from megatron_slm.corpus.preprocessing.found import Found
from megatron_slm.corpus.preprocessing.output_paths import OutputPaths
from megatron_slm.corpus.preprocessing.settings import Setup
from megatron_slm.corpus.preprocessing.settle import settle
from megatron_slm.corpus.preprocessing.shard import remove_shard, shard_prefix
from megatron_slm.data.indexed_format import token_dtype
from megatron_slm.data.manifest import manifest_path, write_data_args, write_manifest
from megatron_slm.data.manifest_types import (
    DatasetCounts,
    DatasetManifest,
    DecidedDatasets,
    DocumentCounts,
    Reject,
    ShardManifest,
    ShardOptions,
    total_counts,
)
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, open_regular

MOST_IN_A_BLEND = 32766
LONGEST_REJECT = 1 << 20  # bytes of a line in a list of rejects


@dataclass(frozen=True)
class PreprocessingSummary:
    """The result of a run: its datasets."""

    layout: OutputPaths
    datasets: dict[str, DatasetManifest]
    """Manifests by key."""

    @property
    def shards(self) -> list[ShardManifest]:
        """Manifests of their shards, with the counts over all keys."""
        return self.datasets[self.layout.keys[0]].shards

    @property
    def counts(self) -> DocumentCounts:
        """What became of the documents of all shards."""
        return total_counts([shard.counts for shard in self.shards])


def remove_lists(found: Found, layout: OutputPaths) -> None:
    """Remove lists and manifests of datasets that are not merged, before their shards change."""
    for key, manifest in found.in_place.items():
        if manifest is None or not manifest.merged:
            manifest_path(layout.dataset(key)).unlink(missing_ok=True)
            Path(f"{layout.dataset(key)}.data-args.txt").unlink(missing_ok=True)


def remove_strangers(layout: OutputPaths, names: set[str]) -> None:
    """Remove what earlier runs have left of tasks that are not in this run."""
    for path in layout.shards.glob("*.json"):
        of_a_shard = not path.stem.endswith((".fingerprints", ".manifest"))
        if of_a_shard and is_ours(path) and path.stem not in names:
            remove_shard(layout, path.stem)
    for path in layout.rejects.glob("*.jsonl"):
        if is_ours(path) and path.stem not in names:
            path.unlink()


def check_rejects(layout: OutputPaths, shards: Sequence[ShardManifest], most: float) -> None:
    """Check that few enough of the shards' documents could not be used.

    Raises:
        UserError: it is a larger fraction than `most` of all documents, including those that a
            filter leaves out.
    """
    counts = total_counts([shard.counts for shard in shards])
    rejects = counts.rejects
    seen = counts.read + counts.filtered + rejects
    if rejects > most * seen:
        what = (
            f"{rejects} of {seen} documents could not be used, more than "
            f"--max-reject-fraction {most:g} of them"
        )
        lists = (layout.rejects / f"{shard.name}.jsonl" for shard in shards)
        first = next(filter(Path.exists, lists), None)
        if first is None:
            raise UserError(f"{what}; their list in {layout.rejects} was removed. Allow more")
        with open_regular(first) as file:
            reject = decode_json(file.readline(LONGEST_REJECT), Reject, first)
        raise UserError(
            f"{what}: {reject.file}:{reject.line}: "
            f"{reject.reason}; all are in {layout.rejects}. Mend them and run again, which "
            "keeps the other shards, or allow more"
        )


def finish(
    setup: Setup, shards: Sequence[ShardManifest], merged: Collection[str], found: Found
) -> PreprocessingSummary:
    """Make the datasets of all shards.

    Args:
        setup: the run.
        shards: manifests of all shards, in order.
        merged: names of the shards that are part of the datasets that were found.
        found: what earlier runs have left.

    Raises:
        UserError: there are too many rejects or no documents at all, or the disk is full.
    """
    layout, settings = setup.layout, setup.settings
    check_rejects(layout, shards, settings.max_reject_fraction)
    counts = {key: _counts(setup, key, shards) for key in layout.keys}
    if settings.merge:
        datasets = _merge_all(setup, counts, shards, merged, found)
    else:
        datasets = _list_all(setup, counts, shards)
    remove_strangers(layout, {shard.name for shard in shards})
    layout.clear(settings.merge)
    return PreprocessingSummary(layout, datasets)


def _counts(setup: Setup, key: str, shards: Sequence[ShardManifest]) -> DatasetCounts:
    """Return the size of a key's dataset.

    Raises:
        UserError: it would have no documents.
    """
    outputs = [shard.outputs[key] for shard in shards]
    documents = sum(output.documents for output in outputs)
    if documents == 0:
        raise UserError(f"{_why_nothing(key, shards, setup.options)}: nothing to write")
    return DatasetCounts(documents, sum(output.tokens for output in outputs))


def _why_nothing(key: str, shards: Sequence[ShardManifest], options: ShardOptions) -> str:
    """Return why no document of any shard has a token under a key."""
    counts = total_counts([shard.counts for shard in shards])
    if counts.filtered and not counts.read:
        filters = " ".join(f"--filter {name}={value}" for name, value in options.filters)
        return f"{filters} leaves none of {counts.filtered:,} documents"
    names = ("filtered", "rejects", "exact_duplicates", "near_duplicates", "contaminated")
    left_out = [
        f"{count:,} {name.replace('_', ' ')}" for name in names if (count := getattr(counts, name))
    ]
    if left_out and not counts.empty:
        return f"no document is left under {key!r} ({', '.join(left_out)})"
    return f"no document has any text under {key!r}"


def _merge_all(
    setup: Setup,
    counts: dict[str, DatasetCounts],
    shards: Sequence[ShardManifest],
    merged: Collection[str],
    found: Found,
) -> dict[str, DatasetManifest]:
    """Write all datasets before replacing any old one, which may be the only place of a shard."""
    layout, datasets = setup.layout, {}
    dtype = token_dtype(setup.options.tokenizer.vocab_size)
    try:
        for key in layout.keys:
            parts = _parts(layout, shards, merged, key, found)
            data, index = merge(layout.dataset(key), parts, dtype, setup.settings.workers)
            own = [shard.of_key(key) for shard in shards]
            datasets[key] = DatasetManifest(setup.options, True, counts[key], own, data, index)
        write_manifest(layout.decided, DecidedDatasets(datasets))
    finally:
        settle(layout)
    return datasets


def _list_all(
    setup: Setup, counts: dict[str, DatasetCounts], shards: Sequence[ShardManifest]
) -> dict[str, DatasetManifest]:
    """Write lists of the shards as the datasets, in place of older datasets."""
    layout = setup.layout
    weights = {key: _weights(layout, key, shards) for key in layout.keys}
    for key in layout.keys:
        prefix = layout.dataset(key)
        for suffix in ("idx", "bin", "manifest.json"):  # of an older dataset that was merged
            Path(f"{prefix}.{suffix}").unlink(missing_ok=True)
        write_data_args(prefix, weights[key])
    datasets = {
        key: DatasetManifest(
            setup.options, False, counts[key], [shard.of_key(key) for shard in shards]
        )
        for key in layout.keys
    }
    for key, manifest in datasets.items():
        write_manifest(manifest_path(layout.dataset(key)), manifest)
    return datasets


def _parts(
    layout: OutputPaths,
    shards: Sequence[ShardManifest],
    merged: Collection[str],
    key: str,
    found: Found,
) -> list[DocumentRange]:
    """Return the place where each shard's documents are now."""
    old: dict[str, DocumentRange] = {}
    first = offset = 0
    for shard in found.datasets[key].shards if merged and found.datasets is not None else []:
        documents, size = shard.output.documents, shard.output.bin.size
        old[shard.name] = DocumentRange(layout.dataset(key), first, documents, offset, size)
        first, offset = first + documents, offset + size
    return [
        old[shard.name]
        if shard.name in merged
        else DocumentRange(
            shard_prefix(layout.shards, shard.name, key),
            0,
            shard.outputs[key].documents,
            0,
            shard.outputs[key].bin.size,
        )
        for shard in shards
    ]


def _weights(layout: OutputPaths, key: str, shards: Sequence[ShardManifest]) -> dict[str, int]:
    """Return the weight of each shard's pair (its token count) by prefix, as --data-args-path
    expects."""
    weights = {
        str(shard_prefix(layout.shards, shard.name, key)): shard.outputs[key].tokens
        for shard in shards
        if shard.outputs[key].documents
    }
    if len(weights) > MOST_IN_A_BLEND:
        raise UserError(
            f"Megatron blends at most {MOST_IN_A_BLEND} datasets, not {len(weights)}: merge them, "
            "or choose a larger --shard-size"
        )
    return weights
