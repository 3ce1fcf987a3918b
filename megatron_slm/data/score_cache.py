"""Reference losses on disk: written once by a scoring job, read by any number of training runs.

    DIR/manifest.json           what was scored with what (score_manifest.py)
    DIR/SECTION/00000.losses    shards: a fixed number of records each, the last one fewer
    record                      [s] losses, domain, CRC-32 of the labels, CRC-32 of all of it

A section is a split of training samples in the order in which training draws them (kind "sample"),
or a dataset cut into windows of s tokens in the order of its file (kind "document").  A shard gets
its name when it is whole and on the disk, so what has a name is good, and a killed job goes on with
the others.  Every record proves itself when it is read: its checksum begins with the manifest, the
section and the record's number, so that it holds in its own place alone; by sample, the labels are
those scored.  Records are read, not mapped: a shard that is cut while a run reads it is an error
with a name, and not a bus error.
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

OPEN_SHARDS = 16  # of each reading process
SCORE_AGAIN = "delete it and run tools/score_reference.py again"
LEAST = -1e-3  # nats: a loss is not negative but for rounding

# uint16 holds round(8192 sqrt(loss)): losses up to 63.99 nats (larger ones are that) within
# (sqrt(loss) + 0.0001) / 8192: 1.2e-4 at 1 nat, 3.9e-4 at 10.  float16 errs by 4.9e-4 and 3.9e-3.
SQUARE_ROOT_STEPS = 8192.0


def encode(losses: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Losses (nats, not negative but for rounding) as they are stored."""
    if dtype == "float32":
        return losses
    steps = np.sqrt(np.maximum(losses, 0.0), dtype=np.float64) * SQUARE_ROOT_STEPS
    return np.minimum(np.rint(steps), np.iinfo(np.uint16).max).astype(np.uint16)


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """The reverse of encode, up to what its type can hold."""
    if stored.dtype == np.float32:
        return stored.astype(np.float32)
    return np.square(stored / SQUARE_ROOT_STEPS).astype(np.float32)


def checksum(values: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))


def shard_path(directory: Path, section: str, shard: int) -> Path:
    """Where a whole shard is, or will be."""
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
    """Losses [records, s] in nats, of labels [records, s] from a blend's datasets [records], on the
    disk before the shard has its name.

    Raises:
        ValueError: these are not the shard's records.
        UserError: a loss is not finite or is negative, or the directory cannot be written to.
    """
    numbers = manifest.records_of(section, shard)
    if losses.shape != (len(numbers), manifest.sequence_length) or losses.shape != labels.shape:
        raise ValueError(f"{losses.shape} losses, {labels.shape} labels for {numbers}")
    if len(bad := np.flatnonzero(~_possible(losses).all(axis=1))):
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


def _possible(losses: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of them a model can have."""
    return np.isfinite(losses) & (losses >= LEAST)


def missing_shards(directory: Path, manifest: CacheManifest) -> list[tuple[str, int]]:
    """(section, shard) of those that are not there."""
    return [
        (section, shard)
        for section in manifest.sections
        for shard in _missing(directory, manifest, section)
    ]


def _missing(directory: Path, manifest: CacheManifest, section: str) -> Iterator[int]:
    """Shards of a section that are not there.  By a listing: a file system that thousands of ranks
    ask answers one more readily than a question for each file."""
    there = set(os.listdir(directory / section)) if (directory / section).is_dir() else set()
    for shard in range(manifest.shards(section)):
        if shard_path(directory, section, shard).name not in there:
            yield shard


def read_record(directory: Path, manifest: CacheManifest, section: str, number: int) -> np.void:
    """A record of a section, one of those it has.

    Raises:
        UserError: its shard is missing or damaged, or it is the record of another place.
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
            if manifest.dtype == "float32" and not _possible(record["losses"]).all():
                raise UserError(
                    f"{path} has a loss that is not a finite number from 0 on in record {row} "
                    f"(sample {number}): {SCORE_AGAIN}"
                )
            return record
    raise UserError(
        f"{path} is damaged at record {row} (sample {number}), or is another shard: {SCORE_AGAIN}"
    )


class Section:
    """Reads the losses of a section.

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
        record = read_record(self.directory, self.manifest, self.name, number)
        if labels is not None and checksum(labels) != record["labels_crc"]:
            path = shard_path(self.directory, self.name, number // self.manifest.shard_records)
            raise UserError(
                f"sample {number} of {self.name} has other tokens than those scored in {path}: the "
                "run draws its samples in another order, or from data that has changed; score "
                "with the run's own arguments"
            )
        return decode(record["losses"][part])


# Of all sections together: a process that reads a blend must not run out of open files.
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
