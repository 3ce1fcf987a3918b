"""Store reference losses on disk: a scoring job writes them once, and any number of runs read them.

    DIR/manifest.json           what was scored with what (score_manifest.py)
    DIR/SECTION/00000.losses    shards: a fixed number of records each, the last one fewer
    record                      [s] losses, domain, CRC-32 of the labels, CRC-32 of all of it

A section is a split's samples in the order in which training draws them (kind "sample"), or a
dataset cut into windows of s tokens (kind "document").  A shard gets its name once it is complete
and on disk, so a killed job can continue with the others.  A record's checksum covers the manifest,
the section and the record's number, so it is only valid in its own place.  Records are read, not
mapped, so that a shard truncated during a run is an error that names it, and not a bus error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.score_manifest import CacheManifest
from megatron_slm.errors import UserError
from megatron_slm.files import open_regular, write_whole

OPEN_SHARDS = 16  # in each process that reads
SCORE_AGAIN = "delete it and run tools/score_reference.py again"
LEAST = -1e-3  # nats: rounding can make a loss slightly negative

# uint16 holds round(8192 sqrt(loss)): losses up to 63.99 nats (larger ones are clipped) within
# (sqrt(loss) + 0.0001) / 8192: 1.2e-4 at 1 nat, 3.9e-4 at 10.  float16 errs by 4.9e-4 and 3.9e-3.
SQUARE_ROOT_STEPS = 8192.0
LARGEST_UINT16 = (0xFFFF / SQUARE_ROOT_STEPS) ** 2


def encode(losses: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Convert losses in nats, which are not negative except by rounding, to their stored form."""
    if dtype == "float32":
        return losses
    steps = np.sqrt(np.maximum(losses, 0.0), dtype=np.float64) * SQUARE_ROOT_STEPS
    return np.minimum(np.rint(steps), np.iinfo(np.uint16).max).astype(np.uint16)


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Convert stored losses back to nats, up to the precision of their type."""
    if stored.dtype == np.float32:
        return stored.astype(np.float32)
    return np.square(stored / SQUARE_ROOT_STEPS).astype(np.float32)


def checksum(values: NDArray[Any]) -> int:
    """Return the CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))


def shard_path(directory: Path, section: str, shard: int) -> Path:
    """Return the path of a complete shard."""
    return directory / section / f"{shard:05d}.losses"


def write_shard(
    directory: Path,
    manifest: CacheManifest,
    section: str,
    shard: int,
    losses: NDArray[np.float32],
    labels: NDArray[np.int32],
    domains: NDArray[np.int64],
) -> None:
    """Write a shard, and sync it to disk before it gets its name.

    Args:
        directory: the cache.
        manifest: its manifest.
        section: name of the section.
        shard: number of the shard.
        losses: [records, s], in nats.
        labels: [records, s], the tokens that they are the losses of.
        domains: [records], the number of each record's dataset in the blend.

    Raises:
        ValueError: the number of records is not the shard's.
        UserError: a loss is not finite or is negative, or the directory cannot be written to.
    """
    numbers = manifest.records_of(section, shard)
    if losses.shape != (len(numbers), manifest.sequence_length) or losses.shape != labels.shape:
        raise ValueError(f"{losses.shape} losses, {labels.shape} labels for {numbers}")
    if len(bad := np.flatnonzero(~_can_be(losses, manifest).all(axis=1))):
        raise UserError(
            f"the reference's loss of sample {numbers[bad[0]]} of {section} is not a finite number "
            "from 0 on: is its checkpoint whole?"
        )
    records = np.zeros(len(numbers), manifest.record)
    records["losses"] = encode(losses, manifest.dtype)
    records["domain"] = domains
    for number, record, row in zip(numbers, records, labels, strict=True):
        record["labels_crc"] = checksum(row)
        record["checksum"] = manifest.checksum(section, number, record.tobytes())
    path = shard_path(directory, section, shard)
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, records.tobytes())
    except (OSError, UserError) as error:
        raise UserError(
            f"{error}; the shards that are there are kept, and the same command goes on with the "
            "others"
        ) from error


def _can_be(values: NDArray[np.float32], manifest: CacheManifest) -> NDArray[np.bool_]:
    """Return which values a cache can have: external ones may be any numbers."""
    return np.isfinite(values) if manifest.values == "external" else _possible(values)


def _possible(losses: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which losses a model can have."""
    return np.isfinite(losses) & (losses >= LEAST)


def missing_shards(directory: Path, manifest: CacheManifest) -> list[tuple[str, int]]:
    """Return the section and number of each shard that does not exist."""
    return [
        (section, shard)
        for section in manifest.sections
        for shard in _missing(directory, manifest, section)
    ]


def _missing(directory: Path, manifest: CacheManifest, section: str) -> Iterator[int]:
    """Yield the numbers of a section's shards that do not exist.

    The directory is listed once, which is easier on a file system that thousands of ranks use than
    asking for each file.
    """
    there = set(os.listdir(directory / section)) if (directory / section).is_dir() else set()
    for shard in range(manifest.shards(section)):
        if shard_path(directory, section, shard).name not in there:
            yield shard


def read_record(directory: Path, manifest: CacheManifest, section: str, number: int) -> np.void:
    """Read a record, whose number must be one of the section's.

    Raises:
        UserError: its shard is missing or damaged, or the record belongs to another place.
    """
    shard, row = divmod(number, manifest.shard_records)
    path = shard_path(directory, section, shard)
    size = manifest.record.itemsize
    file = _open_shard(path, size * len(manifest.records_of(section, shard)))
    try:
        content = os.pread(file.fileno(), size, row * size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) == size:
        record: np.void = np.frombuffer(content, manifest.record)[0]
        if manifest.checksum(section, number, content) == record["checksum"]:
            if manifest.dtype == "float32" and not _can_be(record["losses"], manifest).all():
                raise UserError(
                    f"{path} has a loss that is not a finite number from 0 on in record {row} "
                    f"(sample {number}): {SCORE_AGAIN}"
                )
            return record
    raise UserError(
        f"{path} is damaged at record {row} (sample {number}), or is another shard: {SCORE_AGAIN}"
    )


class Section:
    """A reader of a section's losses.

    Raises:
        UserError: a shard is missing.
    """

    def __init__(self, directory: Path, manifest: CacheManifest, name: str) -> None:
        self.directory, self.manifest, self.name = directory, manifest, name
        for shard in _missing(directory, manifest, name):
            raise _is_missing(shard_path(directory, name, shard))

    def __len__(self) -> int:
        return self.manifest.sections[self.name]

    def losses(
        self, number: int, labels: NDArray[np.int32] | None, part: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Return the losses of a record in nats, [s], or a part of them.

        Args:
            labels: [s], the labels that must have been scored; None not to compare them.

        Raises:
            UserError: there is no such record, it is damaged, or other labels were scored.
        """
        if not 0 <= number < len(self):
            raise UserError(
                f"sample {number} of {self.name} is not in the score cache {self.directory}, which "
                f"has {len(self)}: score as many samples as the run draws"
            )
        record = read_record(self.directory, self.manifest, self.name, number)
        if labels is not None and checksum(labels) != record["labels_crc"]:
            path = shard_path(self.directory, self.name, number // self.manifest.shard_records)
            raise UserError(
                f"sample {number} of {self.name} has other tokens than those scored in {path}: the "
                "run draws its samples in another order, or from data that has changed; score "
                "with the run's own arguments"
            )
        return decode(record["losses"][part])


# Shared by all sections, so that a process that reads a blend does not run out of open files.
@lru_cache(OPEN_SHARDS)
def _open_shard(path: Path, size: int) -> BinaryIO:
    if not path.exists():
        raise _is_missing(path)
    file = open_regular(path)
    if (found := os.fstat(file.fileno()).st_size) != size:
        raise UserError(f"{path} is damaged: it has {found} bytes, not {size}; {SCORE_AGAIN}")
    return file


def _is_missing(path: Path) -> UserError:
    return UserError(f"{path} is missing: finish the cache with the command that began it")
