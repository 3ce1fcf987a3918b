"""Open score caches, and check that they hold the losses of the very tokens that a run draws."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from megatron.training.utils import get_blend_and_blend_per_split
from msgspec import UNSET

from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import (
    CacheManifest,
    cache_differences,
    read_cache_manifest,
)
from megatron_slm.data.scored_dataset import check_names, dataset_fingerprint, dataset_name
from megatron_slm.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Caches:
    """The score caches of a run."""

    kind: Literal["sample", "document"]
    """How all of them were scored."""
    sections: dict[str, Section]
    """Their sections, by name; data/score_cache.py says what a section is."""
    identity: str
    """The references that scored them, as a run that resumes must find them again."""

    def check_samples(self, datasets: Sequence[Any], wanted: Sequence[int | None]) -> None:
        """Check that all training, validation and test samples that a run draws were scored.

        Raises:
            UserError: fewer were scored than the run draws.
        """
        for split, dataset, count in zip(SPLITS, datasets, wanted, strict=True):
            scored = len(self.sections[split]) if split in self.sections else 0
            if dataset is not None and (count or 0) > scored:
                raise UserError(
                    f"the run draws {count} {split} samples, and the score cache has {scored}: "
                    "score with the run's own --train-iters, --eval-iters and --eval-interval"
                )


def data_prefixes(args: Namespace) -> list[str]:
    """Return the prefixes of the indexed datasets that the arguments name, each once, in order."""
    blends = _blends(args).values()
    return list(dict.fromkeys(prefix for prefixes, _ in blends for prefix in prefixes))


def describe_data(args: Namespace, kind: str) -> ScoredData:
    """Describe everything that decides which tokens a record holds, as a manifest's `source` does.

    Raises:
        UserError: a dataset cannot be read, or two have one name.
    """
    prefixes = data_prefixes(args)
    check_names(prefixes)
    source = ScoredData(
        tokenizer=args.slm_tokenizer,
        vocabulary=args.slm_vocab_size,
        datasets={dataset_name(prefix): dataset_fingerprint(prefix) for prefix in prefixes},
        inter_document_masking=True if args.dataloader_inter_document_masking else UNSET,
    )
    if kind == "document":
        return source
    return msgspec.structs.replace(
        source,
        seed=args.seed,
        split=args.split,
        reset_position_ids=args.reset_position_ids,
        blends={
            split: ([dataset_name(prefix) for prefix in prefixes], _as_floats(weights))
            for split, (prefixes, weights) in _blends(args).items()
        },
    )


def _as_floats(weights: Sequence[float] | None) -> list[float] | None:
    """Return weights as they are read back, whole numbers too."""
    return None if weights is None else list(map(float, weights))


def open_caches(args: Namespace) -> Caches:
    """Open the score caches that --slm-reference-cache names.

    Raises:
        UserError: one is incomplete, damaged, or was made for other data, another order, another
            tokenizer or another sequence length.
    """
    directories = [Path(directory) for directory in args.slm_reference_cache]
    manifests = [read_cache_manifest(directory) for directory in directories]
    for directory, manifest in zip(directories, manifests, strict=True):
        if manifest.values is not UNSET:
            raise UserError(
                f"--slm-reference-cache {directory} holds values of the kind {manifest.values}, "
                "not losses of a reference"
            )
    kind = manifests[0].kind
    if kind == "sample" and (args.full_validation or args.multiple_validation_sets):
        raise UserError("--slm-reference-cache with --full-validation: score --by document")
    if kind == "sample" and args.dataloader_type != "single":
        raise UserError(
            f"--dataloader-type {args.dataloader_type} draws samples in an order of its own: score "
            "--by document"
        )
    if len(manifests) > 1 and any(manifest.kind != "document" for manifest in manifests):
        raise UserError("several directories in --slm-reference-cache must be --by document each")
    own = describe_data(args, kind)
    sections: dict[str, Section] = {}
    for directory, manifest in zip(directories, manifests, strict=True):
        _check(args, own, directory, manifest)
        if twice := sections.keys() & manifest.sections.keys():
            raise UserError(f"--slm-reference-cache: two have losses of {', '.join(sorted(twice))}")
        sections |= {name: Section(directory, manifest, name) for name in manifest.sections}
    if kind == "document" and (lacking := own.datasets.keys() - sections.keys()):
        raise UserError(
            f"--slm-reference-cache {' '.join(map(str, directories))}: no losses of the datasets "
            f"{', '.join(sorted(lacking))}"
        )
    identity = json.dumps([manifest.reference for manifest in manifests], sort_keys=True)
    return Caches(kind, sections, identity)


def open_values(args: Namespace) -> dict[str, dict[str, Section]]:
    """Open the caches of --slm-token-values; return their sections by kind and dataset.

    Raises:
        UserError: one is incomplete or damaged, holds losses, or was made for other data or another
            tokenizer; or the run's data cannot have them.
    """
    if not args.slm_token_values:
        return {}
    if args.sft or args.mock_data:
        raise UserError("--slm-token-values cannot be used with --sft or --mock-data")
    own = describe_data(args, "document")
    found: dict[str, dict[str, Section]] = {}
    for directory in map(Path, args.slm_token_values):
        manifest = read_cache_manifest(directory)
        if manifest.values is UNSET:
            raise UserError(
                f"--slm-token-values {directory} holds losses of a reference: give it with "
                "--slm-reference-cache"
            )
        # Values have no context, and so serve runs with and without it.
        source = msgspec.structs.replace(
            manifest.source, inter_document_masking=own.inter_document_masking
        )
        _check(args, own, directory, msgspec.structs.replace(manifest, source=source))
        sections = found.setdefault(manifest.values, {})
        if twice := sections.keys() & manifest.sections.keys():
            raise UserError(f"--slm-token-values: two have values of {', '.join(sorted(twice))}")
        sections |= {name: Section(directory, manifest, name) for name in manifest.sections}
    for kind, sections in found.items():
        if lacking := own.datasets.keys() - sections.keys():
            raise UserError(
                f"--slm-token-values {' '.join(args.slm_token_values)}: no values of the kind "
                f"{kind} of the datasets {', '.join(sorted(lacking))}"
            )
    return found


def _check(args: Namespace, own: ScoredData, directory: Path, manifest: CacheManifest) -> None:
    apart, own_apart = (data.inter_document_masking is True for data in (manifest.source, own))
    if apart != own_apart:
        raise UserError(
            f"the score cache {directory} was scored {_with(apart)} "
            f"--dataloader-inter-document-masking, and this run is {_with(own_apart)} it: its "
            "tokens have another context; score again with the run's own arguments"
        )
    scored: dict[str, Any] = msgspec.to_builtins(manifest.source)
    mine: dict[str, Any] = msgspec.to_builtins(own)
    # Documents serve any sequence length, and a cache may have more datasets than a run reads.
    if manifest.kind == "document":
        both = scored["datasets"].keys() & mine["datasets"].keys()
        for source in (scored, mine):
            source["datasets"] = {name: source["datasets"][name] for name in both}
    else:
        scored["sequence_length"] = manifest.sequence_length
        mine["sequence_length"] = args.seq_length
    if found := cache_differences(mine, scored):
        raise UserError(f"the score cache {directory} was made for another run: {found}")


def _with(given: bool) -> str:
    return "with" if given else "without"


def _blends(args: Namespace) -> dict[str, tuple[list[str], list[float] | None]]:
    """Return the prefixes and weights of each split's datasets, or of "all" splits together."""
    blend, per_split = get_blend_and_blend_per_split(args)
    named = {"all": blend, **dict(zip(SPLITS, per_split or [], strict=False))}
    return {split: each for split, each in named.items() if each is not None}
