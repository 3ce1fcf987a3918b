"""Hash the runs of n words in a text, to find near-duplicates and contamination."""

from __future__ import annotations

import functools
import re
import unicodedata
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SHINGLES_VERSION = 2  # raise it when the definition of a word changes
WORD = re.compile(rb"[0-9a-z\x80-\xff]+")  # UTF-8, in lower case
ZERO_WIDTH_SPACE, VARIATION_SELECTORS = 0x200B, range(0xFE00, 0xFE10)
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, n: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each run of n words, [words - n + 1]; none for fewer words.

    A word is a run of letters, marks and digits, in lower case and normalised by Unicode's NFKC.
    Spaces, punctuation and symbols separate words.  Invisible characters (soft hyphens, joiners,
    marks of direction, variation selectors) are ignored, as in Unicode's annex 29.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(outside_words()))
    text = text.lower()
    words = np.fromiter(map(crc32, WORD.findall(text.encode())), np.uint64)
    if len(words) < n:
        return np.empty(0, np.uint64)
    words = mix(words)
    found = np.zeros(len(words) - n + 1, np.uint64)
    for at in range(n):  # modulo 2**64
        found = found * FACTOR + words[at : len(words) - n + 1 + at]
    return mix(found)


@functools.cache
def outside_words() -> dict[int, str | None]:
    """Map non-ASCII characters that separate words to a space, and invisible ones to None."""
    found: dict[int, str | None] = {}
    for code in (*range(0x80, 0x20000), *range(0xE0000, 0xE0200)):
        category = unicodedata.category(chr(code))
        if category[0] in "PSZ" or category == "Cc" or code == ZERO_WIDTH_SPACE:
            found[code] = " "
        elif category == "Cf" or code in VARIATION_SELECTORS:
            found[code] = None
    return found


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the entropy of each value over all its bits (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
