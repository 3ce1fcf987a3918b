"""Say where the files of a run are, and keep others out of them.

PREFIX_KEY_document.*   datasets, one for each key (finish.py)
PREFIX_shards/          shards, while they are made (shard.py)
PREFIX_rejects/         lines that could not be used
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.corpus.file_names import DECIDED, STDIN, is_ours
from megatron_slm.data.manifest import manifest_path
from megatron_slm.errors import UserError
from megatron_slm.files import alone_at, is_leftover, writing

LOCK_WAIT = 10.0  # seconds in which the workers of a killed run can end


@dataclass(frozen=True)
class OutputPaths:
    """Where a run's files are."""

    prefix: str
    keys: tuple[str, ...]

    @property
    def shards(self) -> Path:
        return Path(f"{self.prefix}_shards")

    @property
    def rejects(self) -> Path:
        return Path(f"{self.prefix}_rejects")

    @property
    def decided(self) -> Path:
        """Manifests of new datasets that are complete but have not replaced the old ones yet."""
        return self.shards / DECIDED

    def dataset(self, key: str) -> Path:
        """Return the prefix of a key's dataset."""
        return Path(f"{self.prefix}_{key}_document")

    @contextmanager
    def claim(self, alone: bool) -> Iterator[None]:
        """Create the directories and, if `alone`, keep other such runs on this machine out of them.

        Raises:
            UserError: another program's dataset, or its files in one of the directories, are in the
                way, or another run is at work.
        """
        try:
            self.shards.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-prefix: {self.shards.parent} cannot be made a directory: "
                f"{error.strerror}"
            ) from error
        with alone_at(self.shards, "--output-prefix", LOCK_WAIT) if alone else nullcontext():
            self._make()
            yield

    def alone_on(self, path: Path) -> AbstractContextManager[None]:
        """Be the only process on this machine, of any stage and rank, that writes a part."""
        return alone_at(path, "--output-prefix", LOCK_WAIT)

    def _make(self) -> None:
        for key in self.keys:
            known = manifest_path(self.dataset(key)).exists() or self.decided.exists()
            for suffix in ("idx", "bin"):
                path = Path(f"{self.dataset(key)}.{suffix}")
                if os.path.lexists(path) and not known:
                    raise UserError(
                        f"{path} exists and has no manifest, so it is not of this program's "
                        "making: remove both .bin and .idx, or choose another --output-prefix"
                    )
        try:
            for directory in (self.shards, self.rejects):
                directory.mkdir(exist_ok=True)
                for path in directory.iterdir():
                    if not is_ours(path) and not path.name.startswith("."):
                        raise UserError(
                            f"{path} is not of this program's making, but {directory} is for its "
                            "files alone: move it elsewhere, or choose another --output-prefix"
                        )
        except OSError as error:
            raise UserError(f"--output-prefix: {error.filename}: {error.strerror}") from error

    def remove_leftovers(self) -> None:
        """Remove unfinished files of this process and of processes that have ended."""
        name = Path(self.prefix).name
        for path in (
            *self.shards.glob("*.partial"),
            *self.rejects.glob("*.partial"),
            *self.shards.parent.glob(f"{glob.escape(name)}_*.partial"),
        ):
            if is_leftover(path):
                path.unlink(missing_ok=True)

    def clear(self, merged: bool) -> None:
        """Remove shards that are now part of the dataset, and directories that are empty.

        What another key's dataset lists, which was not merged, stays.
        """
        prefix, suffix = Path(self.prefix).name, ".data-args.txt"
        lists = self.shards.parent.glob(f"{glob.escape(prefix)}_*_document{suffix}")
        listed = tuple(path.name.removeprefix(prefix).removesuffix(suffix) for path in lists)
        # Manifests first: if this run is killed here, none tells the next of a file that is gone.
        for path in sorted(self.shards.iterdir(), key=lambda path: path.suffix != ".json"):
            ends = merged and is_ours(path) and not path.stem.endswith(listed)
            if ends or path.name == STDIN:
                path.unlink(missing_ok=True)
        for directory in (self.shards, self.rejects):
            with suppress(OSError):  # if it is not empty
                directory.rmdir()

    def spool_stdin(self) -> str:
        """Save standard input to a file, which can be cut into tasks and read again.

        Returns:
            The file's path.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.shards / STDIN
        try:
            with writing(path) as unfinished, unfinished.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        except UserError as error:
            raise UserError(f"--input -: {error}") from error
        return str(path)
