"""Where the files of a run are, and their names while they are written.

PREFIX_KEY_document.*   datasets, one for each key (finish.py)
PREFIX_shards/          shards in the making (shard.py)
PREFIX_rejects/         lines that could not be used
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.data.indexed_format import HOST, temporary
from megatron_slm.data.manifest import manifest_path
from megatron_slm.errors import UserError

STDIN = "stdin.jsonl"


@dataclass(frozen=True)
class Layout:
    """Where a run's files are."""

    prefix: str
    keys: tuple[str, ...]

    @property
    def shards(self) -> Path:
        return Path(f"{self.prefix}_shards")

    @property
    def rejects(self) -> Path:
        return Path(f"{self.prefix}_rejects")

    def dataset(self, key: str) -> Path:
        """The prefix of a key's dataset."""
        return Path(f"{self.prefix}_{key}_document")

    def make(self) -> None:
        """Make the directories, unless another program's dataset is in the way."""
        for key in self.keys:
            index = Path(f"{self.dataset(key)}.idx")
            known = manifest_path(self.dataset(key)).exists() or self.shards.exists()
            if index.exists() and not known:
                raise UserError(
                    f"{index} exists and has no manifest, so it is not of this program's making: "
                    "remove it and its .bin, or choose another --output-prefix"
                )
        try:
            if not self.shards.parent.is_dir():
                raise UserError(f"--output-prefix: {self.shards.parent} is not a directory")
            self.shards.mkdir(exist_ok=True)
            self.rejects.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-prefix {self.prefix}: {error.strerror}") from error

    def remove_leftovers(self) -> None:
        """Remove what this process, and those of this machine that are no more, were writing."""
        name = Path(self.prefix).name
        for path in (
            *self.shards.glob("*.partial"),
            *self.rejects.glob("*.partial"),
            *self.shards.parent.glob(f"{glob.escape(name)}_*.partial"),
        ):
            host, _, process = path.name.split(".")[-2].rpartition("-")
            ended = process == str(os.getpid()) or not Path("/proc", process).exists()
            if host == HOST and ended:
                path.unlink(missing_ok=True)

    def clear(self, merged: bool) -> None:
        """Remove shards that are part of the dataset now, and empty directories."""
        if merged:
            shutil.rmtree(self.shards)
        (self.shards / STDIN).unlink(missing_ok=True)
        with suppress(OSError):
            self.rejects.rmdir()

    def spool_stdin(self) -> str:
        """Standard input as a file, which can be cut into tasks and read again."""
        path = self.shards / STDIN
        unfinished = temporary(path)
        try:
            with unfinished.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            unfinished.replace(path)
        except OSError as error:
            raise UserError(f"--input -: cannot keep it in {path}: {error.strerror}") from error
        return str(path)
