"""Read and write a score cache's manifest, which says what was scored with which reference.

It is written first and never changes.  A run compares it with its own arguments, and it is part of
every record's checksum.  In format 1, of version 0.1, a checksum covers a record's losses alone:
such a cache is read too, but a record in another's place is noticed by its labels only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.errors import UserError
from megatron_slm.files import alone_at, read_json, write_whole

MANIFEST = "manifest.json"
CACHE_FORMAT = 2
MOST_SHARDS = 1 << 20  # of a section, since they are listed at every start
STORED_TYPES = {"uint16": np.uint16, "float32": np.float32}

# A killed replica loses at most one shard.  A shard is also the unit of work that is shared among
# replicas, and a device holds one at a time.
MOST_TOKENS, LEAST_RECORDS, SHARDS = 1 << 23, 16, 512

_Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
Name = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}$)[^/\0]+$")]  # a valid name of a directory


def shard_size(sections: Mapping[str, int], sequence_length: int) -> int:
    """Choose how many records a shard has, given those of each section."""
    enough = max(LEAST_RECORDS, max(sections.values()) // SHARDS)
    return max(1, min(enough, MOST_TOKENS // sequence_length))


class CacheManifest(msgspec.Struct, frozen=True, dict=True):
    """What a cache holds."""

    kind: Literal["sample", "document"]
    """Whether a record is a training sample, or a window of a dataset."""
    dtype: Literal["uint16", "float32"]
    """How losses are stored."""
    sequence_length: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    """Tokens of a record, s."""
    shard_records: _Positive
    """Records of each shard; a section's last shard may have fewer."""
    sections: dict[Name, _Positive]
    """Records of each section, by name."""
    source: ScoredData
    """Fingerprints of what was scored: data, order and tokenizer."""
    reference: dict[str, str]
    """Fingerprint of the checkpoint that scored."""
    values: Literal["external", "mask"] | UnsetType = UNSET
    """What is stored, if not losses of a reference: values for a score, or 1 and 0 for tokens that
    may and may not count."""
    format: int = CACHE_FORMAT
    """What a record's checksum covers."""

    def __post_init__(self) -> None:
        if self.format not in (1, CACHE_FORMAT):
            raise ValueError(
                f"it is of format {self.format}, and this version reads 1 and {CACHE_FORMAT}"
            )
        if self.values == "external" and self.dtype != "float32":
            raise ValueError("external values, which may be negative, are float32")
        if self.kind == "sample" and self.source.blends is UNSET:
            raise ValueError("its source has no blends")
        if self.kind == "document" and not self.sections.keys() <= self.source.datasets.keys():
            raise ValueError("its source has not the datasets of its sections")
        for section in self.sections:
            if self.shards(section) > MOST_SHARDS:
                raise ValueError(
                    f"section {section} has {self.shards(section)} shards, more than {MOST_SHARDS}"
                )

    def write(self, directory: Path) -> None:
        """Write the manifest, or check that the one already there is the same, so a job continues.

        Raises:
            UserError: the directory holds another cache, or cannot be written to.
        """
        path = directory / MANIFEST
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror}") from error
        with alone_at(path, "--slm-reference-cache", wait=60.0):
            if not path.exists():
                content = {"format": self.format, **self._plain}
                write_whole(path, json.dumps(content, indent=1).encode())
                return
            there = read_cache_manifest(directory)
            if there.format != self.format:
                raise UserError(
                    f"{path} was begun by an older version, whose format {there.format} is read "
                    "but no longer written; choose another directory"
                )
            if found := cache_differences(self._plain, there._plain):
                raise UserError(
                    f"{path} was begun with other arguments ({found}); give those, or choose "
                    "another directory"
                )

    @property
    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = msgspec.to_builtins(self)
        del plain["format"]
        return plain

    @cached_property
    def record(self) -> np.dtype[Any]:
        losses = (STORED_TYPES[self.dtype], (self.sequence_length,))
        return np.dtype(
            [("losses", *losses), ("domain", "<u4"), ("labels_crc", "<u4"), ("checksum", "<u4")]
        )

    @cached_property
    def _crc(self) -> int:
        return zlib.crc32(json.dumps(self._plain, sort_keys=True).encode())

    def checksum(self, section: str, number: int, record: bytes) -> int:
        """Return the CRC-32 of a record in its place, without the checksum that it ends with."""
        if self.format == 1:
            return zlib.crc32(memoryview(record)[: self.record["losses"].itemsize])
        place = zlib.crc32(f"{section}/{number}".encode(), self._crc)
        return zlib.crc32(memoryview(record)[: -np.dtype("<u4").itemsize], place)

    def shards(self, section: str) -> int:
        return -(-self.sections[section] // self.shard_records)

    def records_of(self, section: str, shard: int) -> range:
        """Return the numbers that a shard's records have in its section."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.sections[section]))


def cache_differences(run: dict[str, Any], scored: dict[str, Any]) -> str:
    """Say in what a run differs from what was scored; return an empty string if in nothing."""
    runs, scoreds = _flat(run), _flat(scored)
    return "; ".join(
        f"{name} is {runs.get(name)} here, {scoreds.get(name)} there"
        for name in sorted(runs.keys() | scoreds.keys())
        if runs.get(name) != scoreds.get(name)
    )


def read_cache_manifest(directory: Path) -> CacheManifest:
    """Read the manifest of a cache.

    Raises:
        UserError: there is none, or this version cannot read it.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(
            f"{directory} is not a score cache: it has no {MANIFEST}; make one with "
            "tools/score_reference.py"
        )
    return read_json(path, CacheManifest)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
