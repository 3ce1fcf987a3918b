"""Find documents that contain a part of an evaluation set: any 13 consecutive words.

The criterion is that of Brown et al. 2020 (arXiv 2005.14165), appendix C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_slm.corpus.cleaning.shingles import shingles
from megatron_slm.corpus.reading.inputs import open_piece
from megatron_slm.corpus.reading.lines import LONGEST_LINE, InputHash, read_lines
from megatron_slm.errors import UserError

NGRAM = 13


@dataclass(frozen=True)
class Contamination:
    """What evaluation sets contain."""

    hashes: NDArray[np.uint64]
    """Hashes of all runs of 13 words in the evaluation sets, sorted."""
    too_short: int
    """Number of strings in them with fewer words, which are not looked for."""

    def hit(self, text: str) -> bool:
        """Return whether a text has such a run of words."""
        found = shingles(text, NGRAM)
        at = np.searchsorted(self.hashes, found)
        return bool((self.hashes[np.minimum(at, len(self.hashes) - 1)] == found).any())

    @property
    def sha256(self) -> str:
        """Hash of the hashes, which identifies the evaluation sets."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()


def read_evaluation_sets(paths: tuple[str, ...]) -> Contamination:
    """Read all strings, at any depth, of jsonl files, which may be compressed (.gz, .zst).

    Raises:
        UserError: a file cannot be read, a line is bad, or all strings are too short.
    """
    found, too_short = [], 0
    for path in paths:
        for text in _strings(path):
            hashes = shingles(text, NGRAM)
            too_short += hashes.size == 0
            found.append(hashes)
    hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *found]))
    if not hashes.size:
        raise UserError(f"--decontaminate: no text of {NGRAM} words or more in {', '.join(paths)}")
    return Contamination(hashes, too_short)


def _strings(path: str) -> Iterator[str]:
    piece = open_piece(path)
    if piece.kind == "parquet":
        raise UserError(f"--decontaminate {path}: give evaluation sets as jsonl")
    number = 0
    for lines in read_lines(piece, InputHash(lambda _: None)):
        if isinstance(lines, int):
            number += lines
            continue
        for line in lines:
            number += 1
            if line is None:
                raise UserError(f"{Path(path)}:{number}: longer than {LONGEST_LINE} bytes")
            if not line.strip():
                continue
            try:
                yield from _leaves(orjson.loads(line))
            except orjson.JSONDecodeError as error:
                raise UserError(f"{Path(path)}:{number}: not JSON: {error.msg}") from error


def _leaves(record: Any) -> Iterator[str]:
    """Yield all strings of a record except keys, in order, without recursion, since records can be
    deeply nested."""
    left = [record]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += reversed(value.values())
        elif isinstance(value, list):
            left += reversed(value)
