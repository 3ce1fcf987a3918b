"""Sort tokens by their text: starts and insides of words, numbers, code, markup and the rest.

The first kind that fits counts:

    markup        has one of < > & or a backslash, as HTML and TeX have
    code          has one of MARKS, which programs have more often than prose
    number        has digits and no letters
    word start    begins with a letter, after a space, its own or of the token before
    inside word   has letters
    punctuation   is visible
    space         shows nothing but spaces, line ends and tabs
    other         is no text: part of a character, or a token that is shown by its number
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.dynamics.token_dynamics import TokenDynamics

TOKEN_KINDS = (
    "word start",
    "inside word",
    "number",
    "code",
    "markup",
    "punctuation",
    "space",
    "other",
)
MARKUP = frozenset("<>&\\")
MARKS = frozenset("_={}[]()+*/%^|~@#$`")
BLANK = " \n\t\u21b5\u2192"  # with what token_text.py shows line ends and tabs by
NO_TEXT = "\u27e8"  # begins what it shows by its number


def token_kinds(dynamics: TokenDynamics, texts: Sequence[str]) -> NDArray[np.int8]:
    """Return the kind of each token, [T], as an index into TOKEN_KINDS.

    Args:
        dynamics: the T tokens, in order.
        texts: [T], the text shown for each.
    """
    follows = np.zeros(len(texts), np.bool_)  # in the same sample, with no masked token between
    follows[1:] = (np.diff(dynamics.samples) == 0) & (np.diff(dynamics.positions) == 1)
    kinds = (
        _kind(text, joined and before[-1:].isalpha())
        for text, before, joined in zip(texts, ["", *texts], follows.tolist(), strict=False)
    )
    numbers = {kind: number for number, kind in enumerate(TOKEN_KINDS)}
    return np.fromiter((numbers[kind] for kind in kinds), np.int8, len(texts))


@lru_cache(1 << 20)  # millions of tokens have the texts of one vocabulary
def _kind(text: str, in_word: bool) -> str:
    """Return the kind of a token's text, given whether a letter is before it."""
    if NO_TEXT in text:
        return "other"
    if MARKUP & set(text):
        return "markup"
    if MARKS & set(text):
        return "code"
    letters = any(map(str.isalpha, text))
    if not letters and any(map(str.isdigit, text)):
        return "number"
    shown = text.lstrip(BLANK)
    if letters:
        starts = shown != text or not in_word
        return "word start" if starts and shown[0].isalpha() else "inside word"
    return "punctuation" if shown else "space"
