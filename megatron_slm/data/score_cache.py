"""Reference losses on disk: written once by a scoring job, read by any number of training runs.

    DIR/manifest.json           what was scored with what; written first, never changed
    DIR/SECTION/00000.losses    shards: a fixed number of records each, the last one fewer
    record                      [s] losses, domain, CRC-32 of the labels, CRC-32 of the losses

A section is a split of training samples in the order in which training draws them (kind "sample"),
or a dataset cut into windows of s tokens in the order of its file (kind "document").  A shard gets
its name when it is whole and on the disk, so what has a name is good, and a killed job goes on with
the others.  Every record proves itself when it is read: that its bytes are those written and, by
sample, that the labels are those scored.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

MANIFEST = "manifest.json"
FORMAT = 1
OPEN_SHARDS = 16  # of each reading process

# uint16 holds round(8192 sqrt(loss)): losses up to 63.99 nats (larger ones are that) within
# (sqrt(loss) + 0.0001) / 8192: 1.2e-4 at 1 nat, 3.9e-4 at 10.  float16 errs by 4.9e-4 and 3.9e-3.
STEPS = 8192.0
DTYPES = {"uint16": np.uint16, "float32": np.float32}


def encode(losses: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Losses (nats, not negative but for rounding) as they are stored."""
    if dtype == "float32":
        return losses
    steps = np.sqrt(np.maximum(losses, 0.0), dtype=np.float64) * STEPS
    return np.minimum(np.rint(steps), np.iinfo(np.uint16).max).astype(np.uint16)


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """The reverse of encode, up to what its type can hold."""
    if stored.dtype == np.float32:
        return stored.astype(np.float32)
    return np.square(stored / STEPS).astype(np.float32)


def checksum(values: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    kind: "sample" or "document".  dtype: of stored losses.  sequence_length: s.
    shard_records: records of each shard but a section's last.
    sections: records of each section.
    source: fingerprints of what was scored: data, order, tokenizer.
    reference: fingerprint of the checkpoint that scored.
    """

    kind: Literal["sample", "document"]
    dtype: Literal["uint16", "float32"]
    sequence_length: int
    shard_records: int
    sections: dict[str, int]
    source: dict[str, Any]
    reference: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write it, or check that a job that goes on is the job that began.

        Raises:
            UserError: directory holds another cache, or cannot be written to.
        """
        path = directory / MANIFEST
        if path.exists():
            if found := differences(asdict(self), asdict(read_manifest(directory))):
                raise UserError(
                    f"{path} was begun with other arguments ({found}); give those, or choose "
                    "another directory"
                )
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"
            write_whole(path, text.encode())
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror}") from error

    @property
    def record(self) -> np.dtype[Any]:
        losses = (DTYPES[self.dtype], (self.sequence_length,))
        return np.dtype(
            [("losses", *losses), ("domain", "<u4"), ("labels_crc", "<u4"), ("losses_crc", "<u4")]
        )

    def shards(self, section: str) -> int:
        return -(-self.sections[section] // self.shard_records)

    def records_of(self, section: str, shard: int) -> range:
        """Numbers of a shard's records in its section."""
        first = shard * self.shard_records
        return range(first, min(first + self.shard_records, self.sections[section]))


def differences(run: dict[str, Any], scored: dict[str, Any]) -> str:
    """What a run has other than what was scored; empty if nothing."""
    runs, scoreds = _flat(run), _flat(scored)
    return "; ".join(
        f"{name} is {runs.get(name)} here, {scoreds.get(name)} there"
        for name in sorted(runs.keys() | scoreds.keys())
        if runs.get(name) != scoreds.get(name)
    )


def shard_path(directory: Path, section: str, shard: int) -> Path:
    """Where a whole shard is, or will be."""
    return directory / section / f"{shard:05d}.losses"


def read_manifest(directory: Path) -> Manifest:
    """
    Raises:
        UserError: there is none, or none that this version can read.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise UserError(f"{path} was written by another version of megatron-slm")
        return Manifest(**content)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a score cache: it has no {MANIFEST}; make one with "
            "tools/score_reference.py"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_shard(
    directory: Path,
    manifest: Manifest,
    section: str,
    shard: int,
    losses: NDArray[np.float32],
    labels: NDArray[np.int32],
    domains: NDArray[np.int64],
) -> None:
    """Losses [records, s] in nats, of labels [records, s] from a blend's datasets [records], on the
    disk before the shard has its name.

    Raises:
        ValueError: these are not the shard's records.
        UserError: a loss is not a finite number, or the directory cannot be written to.
    """
    numbers = manifest.records_of(section, shard)
    if losses.shape != (len(numbers), manifest.sequence_length) or losses.shape != labels.shape:
        raise ValueError(f"{losses.shape} losses, {labels.shape} labels for {numbers}")
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses).all(axis=1))[0])
        raise UserError(
            f"the reference's loss of sample {numbers[bad]} of {section} is not a finite number: "
            "is its checkpoint whole?"
        )
    records = np.zeros(len(numbers), manifest.record)
    records["losses"] = encode(losses, manifest.dtype)
    records["domain"] = domains
    for record, row in zip(records, labels, strict=True):
        record["labels_crc"] = checksum(row)
        record["losses_crc"] = checksum(record["losses"])
    path = shard_path(directory, section, shard)
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, records.tobytes())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def missing_shards(directory: Path, manifest: Manifest) -> list[tuple[str, int]]:
    """(section, shard) of those that are not there."""
    return [
        (section, shard)
        for section in manifest.sections
        for shard in _missing(directory, manifest, section)
    ]


def _missing(directory: Path, manifest: Manifest, section: str) -> list[int]:
    """Shards of a section that are not there.  By a listing: a file system that thousands of ranks
    ask answers one more readily than a question for each file."""
    there = set(os.listdir(directory / section)) if (directory / section).is_dir() else set()
    return [
        shard
        for shard in range(manifest.shards(section))
        if shard_path(directory, section, shard).name not in there
    ]


class Section:
    """Reads the records of a section.

    Raises:
        UserError: a shard is missing.
    """

    def __init__(self, directory: Path, manifest: Manifest, name: str) -> None:
        self.directory, self.manifest, self.name = directory, manifest, name
        for shard in _missing(directory, manifest, name):
            path = shard_path(directory, name, shard)
            raise UserError(f"{path} is missing: finish the cache with the command that began it")

    def __len__(self) -> int:
        return self.manifest.sections[self.name]

    def losses(
        self, number: int, labels: NDArray[np.int32] | None, part: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Losses [s] of a record, or a part of them, in nats.

        Args:
            labels: [s], what was scored, to be compared; None not to.

        Raises:
            UserError: there is no such record, it is damaged, or it is of other labels.
        """
        if not 0 <= number < len(self):
            raise UserError(
                f"sample {number} of {self.name} is not in the score cache {self.directory}, which "
                f"has {len(self)}: score as many samples as the run draws"
            )
        shard, row = divmod(number, self.manifest.shard_records)
        path = shard_path(self.directory, self.name, shard)
        records = len(self.manifest.records_of(self.name, shard))
        record = _open_shard(path, self.manifest.record, records)[row]
        if checksum(record["losses"]) != record["losses_crc"]:
            raise UserError(
                f"{path} is damaged at record {row} (sample {number}): delete it and run "
                "tools/score_reference.py again"
            )
        if labels is not None and checksum(labels) != record["labels_crc"]:
            raise UserError(
                f"sample {number} of {self.name} has other tokens than those scored in {path}: the "
                "run draws its samples in another order, or from data that has changed; score "
                "with the run's own arguments"
            )
        return decode(record["losses"][part])


# Of all sections together: a process that reads a blend must not run out of mappings.
@lru_cache(OPEN_SHARDS)
def _open_shard(path: Path, record: np.dtype[Any], records: int) -> np.memmap[Any, Any]:
    size = path.stat().st_size
    if size != records * record.itemsize:
        raise UserError(
            f"{path} is damaged: it has {size} bytes, not {records * record.itemsize}; delete it "
            "and run tools/score_reference.py again"
        )
    return np.memmap(path, record, mode="r")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
