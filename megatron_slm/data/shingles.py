"""Hashes of the runs of n words in a text, by which near-duplicates and contamination are found."""

from __future__ import annotations

import re
import unicodedata
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

WORDS = re.compile(rb"[0-9a-z\x80-\xff]+")  # UTF-8, in lower case
SPACES = {code: " " for code in range(0x80, 0x10000) if unicodedata.category(chr(code))[0] in "PZ"}
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, n: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each run of n words [words - n + 1]; none if there are fewer words.

    Case, punctuation, spaces and what else is ASCII but neither letter nor digit do not count.
    """
    text = text.lower() if text.isascii() else text.lower().translate(SPACES)
    words = np.fromiter(map(crc32, WORDS.findall(text.encode())), np.uint64)
    if len(words) < n:
        return np.empty(0, np.uint64)
    words = mix(words)
    found = np.zeros(len(words) - n + 1, np.uint64)
    for at in range(n):  # modulo 2**64
        found = found * FACTOR + words[at : len(words) - n + 1 + at]
    return mix(found)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the entropy of each value over all its bits (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
