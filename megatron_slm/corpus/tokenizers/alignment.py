"""Bring values of one tokenization of a text to the tokens of another, by the bytes both share.

A token covers the bytes from the end of the token before it to its own end.  A segment is a
smallest run of bytes that begins and ends at ends of tokens in both tokenizations.  What a model
loses on a segment is the sum of its tokens' losses there, since they are of the same bytes:

- where both have the same token ends in a segment, each token keeps its own loss;
- otherwise each token gets the part of the segment's sum that it has of the segment's bytes.

So the sum over each segment is kept, and the same tokenization gives the same losses.  A token
without bytes (an incomplete character, whose bytes count for the token that completes it) belongs
to the segment after it, at the end of the text to the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """Two tokenizations of a text, cut into the segments that they share.

    n: tokens of the one that values are brought to; m: tokens of the one that they come from.
    """

    sizes: Ints
    """[n], bytes of each token."""
    segments: Ints
    """[n], number of each token's segment; -1 if the text has no bytes."""
    given_segments: Ints
    """[m], the same of the other tokenization."""
    partners: Ints
    """[n], the token of the other tokenization whose value is kept; -1 where it is shared out."""

    @property
    def one_to_one(self) -> int:
        """Number of tokens that the other tokenization has, too."""
        return int((self.partners >= 0).sum())

    def sums(self, losses: Floats) -> Floats:
        """Return the sum of the other tokenization's losses [m] in each segment."""
        inside = self.given_segments >= 0
        count = int(self.segments.max(initial=-1)) + 1
        sums = np.bincount(self.given_segments[inside], losses[inside], count)
        return sums.astype(np.float64)

    def bring(self, losses: Floats) -> Floats:
        """Bring losses to the tokens.

        Args:
            losses: [m], in nats; NaN where there is none.

        Returns:
            [n], in nats; NaN where a loss of the token's segment is missing.
        """
        if (self.segments < 0).any():
            return np.full(len(self.segments), np.nan)
        size = np.bincount(self.segments, self.sizes)[self.segments]
        shared = self.sums(losses)[self.segments] * self.sizes / size
        kept = self.partners >= 0
        shared[kept] = losses[self.partners[kept]]
        return shared


def align(ends: Ints, given_ends: Ints) -> Alignment:
    """Find the segments that two tokenizations of a text share.

    Args:
        ends: [n], the byte at which each token that values are brought to ends; never falling.
        given_ends: [m], the same of the tokens that values come from.

    Raises:
        ValueError: the two do not end at the same byte.
    """
    size = int(ends[-1]) if len(ends) else 0
    if len(given_ends) and int(given_ends[-1]) != size:
        raise ValueError(f"one tokenization ends at byte {size}, the other at {given_ends[-1]}")
    sizes = np.diff(ends, prepend=0)
    if size == 0 or not len(given_ends):
        none = np.full(len(ends), -1)
        return Alignment(sizes, none, np.full(len(given_ends), -1), none)
    shared = np.intersect1d(ends, given_ends)
    shared = shared[shared > 0]
    segments, given_segments = (_segments(each, shared) for each in (ends, given_ends))
    partners = _partners(ends, given_ends, segments, given_segments)
    return Alignment(sizes, segments, given_segments, partners)


def _segments(ends: Ints, shared: Ints) -> Ints:
    """Return the segment in which each token begins."""
    starts = np.concatenate([[0], ends[:-1]])
    return np.minimum(np.searchsorted(shared, starts, side="right"), len(shared) - 1)


def _partners(ends: Ints, given_ends: Ints, segments: Ints, given_segments: Ints) -> Ints:
    """Return for each token the other's token with the same end, in segments where all have one."""
    count = int(segments[-1]) + 1
    tokens, given = (np.bincount(each, minlength=count) for each in (segments, given_segments))
    first, given_first = (np.cumsum(each) - each for each in (tokens, given))
    alike = tokens == given
    place = given_first[segments] + np.arange(len(ends)) - first[segments]
    candidates = np.flatnonzero(alike[segments])
    apart = ends[candidates] != given_ends[place[candidates]]
    alike[segments[candidates[apart]]] = False
    return np.where(alike[segments], place, -1)


def ends_of_spans(starts: Ints, stops: Ints, size: int) -> Ints:
    """Return the byte at which each token ends, from spans that may overlap or leave gaps.

    Tokens that share a character each name all of it: its bytes count for the last of them.  Bytes
    that no token covers count for the token after them, at the end of the text for the last one.

    Args:
        starts: [n], the byte at which each token's span begins.
        stops: [n], the byte after it.
        size: bytes of the text.
    """
    if not len(starts):
        return np.zeros(0, np.int64)
    following = np.minimum.accumulate(np.append(starts[1:], size)[::-1])[::-1]
    ends = np.maximum.accumulate(np.minimum(stops, following))
    ends[-1] = size
    return ends
