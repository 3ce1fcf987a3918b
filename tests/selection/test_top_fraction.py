"""Exact k of any scores, against a sort."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_slm.selection import select_top_fraction

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
# Few distinct values, so that ties at the threshold are the rule.
COARSE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, float("inf"), -float("inf")])
RATIOS = st.integers(1, 1_000_000).map(lambda units: units / 1_000_000)


def by_sorting(scores: list[float], valid: list[bool], ratio: float) -> list[bool]:
    candidates = [i for i, is_valid in enumerate(valid) if is_valid]
    number = len(candidates)
    count = int(Fraction(str(ratio)) * number + Fraction(1, 2))
    count = min(number, max(1, count))
    # Python's sort is stable and has -0.0 equal to 0.0.
    kept = set(sorted(candidates, key=lambda i: -scores[i])[:count])
    return [i in kept for i in range(len(scores))]


@st.composite
def tokens(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    values = draw(st.lists(st.one_of(FLOATS, COARSE), min_size=1, max_size=200))
    if draw(st.booleans()):
        values = draw(st.lists(COARSE, min_size=1, max_size=200))
    valid = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return values, valid


@given(tokens(), RATIOS)
def test_selects_what_a_sort_selects(data: tuple[list[float], list[bool]], ratio: float) -> None:
    values, valid = data
    scores = torch.tensor(values, dtype=torch.float32)
    selection = select_top_fraction(scores, torch.tensor(valid), ratio)
    expected = by_sorting(scores.tolist(), valid, ratio)
    assert selection.selected.tolist() == expected
    assert selection.valid.item() == sum(valid)
    assert selection.count.item() == sum(expected)
    if any(expected):
        assert selection.threshold.item() == scores[torch.tensor(expected)].min().item()


@pytest.mark.parametrize(
    ("number", "ratio", "count"),
    [
        (0, 0.6, 0),
        (1, 0.01, 1),
        (10, 0.6, 6),
        (45, 0.7, 32),
        (5, 0.5, 3),
        (3, 1.0, 3),
        (7, 1e-6, 1),
    ],
)
def test_count_rounds_half_up(number: int, ratio: float, count: int) -> None:
    selection = select_top_fraction(torch.randn(number), torch.ones(number).bool(), ratio)
    assert selection.selected.sum() == selection.count == count


def test_equal_scores_keep_the_lower_positions() -> None:
    selected = select_top_fraction(torch.zeros(10), torch.ones(10).bool(), 0.35).selected
    assert selected.tolist() == [True] * 4 + [False] * 6


def test_many_tokens() -> None:
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) > 0.1
    selection = select_top_fraction(scores, valid, 0.6)
    expected = _top(scores, valid, int(0.6 * int(valid.sum()) + 0.5))
    assert torch.equal(selection.selected, expected)


def _top(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    order = torch.where(valid, scores, -torch.inf).argsort(descending=True, stable=True)
    return torch.zeros_like(valid).index_fill(0, order[:count], True)
