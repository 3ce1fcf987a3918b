"""Cut the tokens of a dataset into windows, in which they are scored and stored by document.

A token is a label in exactly one window, and the token before it in the file is the input that it
is predicted from.  Windows have s tokens.  Where documents do not see each other, a window ends
early rather than cut a document that fits into one, so that such a document is scored whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DOCUMENTS = 1 << 20  # looked at at once


class Windows:
    """Where the windows of a dataset begin."""

    def __init__(self, lengths: NDArray[np.integer], length: int, apart: bool) -> None:
        """Cut a dataset.

        Args:
            lengths: the tokens of each document, [documents].
            length: tokens of a window, s.
            apart: whether documents do not see each other.
        """
        self.length = length
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.bounds: NDArray[np.int64] | None = None
        """Labels whose inputs begin a document, ascending; None if documents see each other."""
        self.starts: NDArray[np.int64] | None = None
        """The first label of each window; None if every window has s tokens."""
        if apart:
            # The first label of the file has an end-of-document token as its input.
            bounds = lengths.cumsum(dtype=np.int64) - lengths + 1
            # Empty documents repeat a bound.  np.unique would sort, for minutes, what is ascending.
            own = (np.diff(bounds, prepend=0) > 0) & (bounds < self.tokens)
            self.bounds = np.concatenate([[0], bounds[own]])
            self.starts = _starts(self.bounds, self.tokens, length)

    def __len__(self) -> int:
        return -(-self.tokens // self.length) if self.starts is None else len(self.starts)

    def span(self, number: int) -> tuple[int, int]:
        """Return the positions in the file of a window's first label, and of the one after its
        last."""
        if self.starts is None:
            return number * self.length, min((number + 1) * self.length, self.tokens)
        last = number + 1 == len(self.starts)
        return int(self.starts[number]), self.tokens if last else int(self.starts[number + 1])

    def places(self, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the window of each label, given its position in the file, and its place there."""
        if self.starts is None:
            return labels // self.length, labels % self.length
        numbers = np.searchsorted(self.starts, labels, side="right") - 1
        return numbers, labels - self.starts[numbers]

    def ends(self, number: int) -> NDArray[np.int64]:
        """Return 0 and where each document of a window ends; documents do not see each other.

        What is missing of s tokens is a document of its own.
        """
        assert self.bounds is not None
        start, stop = self.span(number)
        inside = slice(*np.searchsorted(self.bounds, [start + 1, stop]).tolist())
        return np.unique([0, *(self.bounds[inside] - start), stop - start, self.length])


@lru_cache(maxsize=2)
def windows_of(index: Any, length: int, apart: bool) -> Windows:
    """Return the windows of an IndexedDataset, given its index.

    The splits of a dataset, which are built one after another, share them.
    """
    return Windows(index.sequence_lengths, length, apart)


def _starts(bounds: NDArray[np.int64], tokens: int, length: int) -> NDArray[np.int64]:
    """Fill windows with as many whole documents as fit, or with a part of one that is too long."""
    starts = []
    at = 0  # the document that the next window begins with
    for begin in range(0, len(bounds), _DOCUMENTS):
        end = min(begin + _DOCUMENTS, len(bounds))
        # Before a document, a window begins at each multiple of s inside it, since only there
        # nothing else fits.
        edges = np.append(bounds[begin:end], bounds[end] if end < len(bounds) else tokens)
        cuts = np.maximum(-(-np.diff(edges) // length) - 1, 0)
        full = edges[:-1] + (cuts + 1) * length  # where the last of these windows would end
        after = np.searchsorted(bounds, full, side="right") - 1
        after[full >= tokens] = len(bounds)
        begun = []
        while at < end:
            begun.append(at - begin)
            at = int(after[at - begin])
        of_each = cuts[begun] + 1
        numbers = np.arange(of_each.sum()) - np.repeat(of_each.cumsum() - of_each, of_each)
        starts.append(np.repeat(edges[begun], of_each) + numbers * length)
    return np.concatenate(starts)
