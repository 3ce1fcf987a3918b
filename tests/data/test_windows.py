"""Windows that end early rather than cut a document, over datasets of any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_slm.data import windows


def filled(documents: list[int], length: int) -> list[int]:
    """Starts, filled by a window, then a document at a time."""
    first = np.cumsum([0, *documents])[:-1].tolist()
    tokens, starts = sum(documents), [0]
    while starts[-1] + length < tokens:
        fitting = [at for at in first if starts[-1] < at <= starts[-1] + length]
        starts.append(fitting[-1] if fitting else starts[-1] + length)
    return starts


@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
@given(documents=st.lists(st.integers(1, 40), min_size=1, max_size=60), length=st.integers(1, 24))
def test_windows_are_filled_with_whole_documents(
    at_once: int, documents: list[int], length: int
) -> None:
    bounds = np.cumsum([0, *documents])[:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_DOCUMENTS", at_once)
        found = windows._starts(bounds, sum(documents), length)
    assert found.tolist() == filled(documents, length)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20).filter(any))
def test_bounds_are_where_documents_with_tokens_begin(documents: list[int]) -> None:
    found = windows.Windows(np.array(documents, np.int32), 4, True)
    begins = np.cumsum([0, *documents])[:-1]
    inputs = {int(first) for first, size in zip(begins, documents, strict=True) if size}
    labels = sorted(first + 1 for first in inputs if first + 1 < sum(documents))
    assert found.bounds is not None and found.bounds.tolist() == [0, *labels]
