"""Exact k of any scores, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from by_sorting import count_of, top, top_of_sets
from megatron_slm.selection import Placement, select_top_fraction, top_fraction

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)
# Few distinct values, so that ties at the threshold are the rule.
COARSE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, float("inf"), -float("inf")])
RATIOS = st.integers(1, 1_000_000).map(lambda units: units / 1_000_000)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    kind = COARSE if draw(st.booleans()) else st.one_of(FLOATS, COARSE)
    values = draw(st.lists(kind, min_size=1, max_size=200))
    valid = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return values, valid


@settings(max_examples=3000, deadline=None)
@given(tokens(), RATIOS)
def test_selects_what_a_sort_selects(data: tuple[list[float], list[bool]], ratio: float) -> None:
    values, valid = data
    scores = torch.tensor([values], dtype=torch.float32)
    selection = select_top_fraction(scores, torch.tensor([valid]), [ratio])
    expected = top(scores[0].tolist(), valid, ratio)
    assert selection.selected[0].tolist() == expected
    assert selection.valid.tolist() == [sum(valid)]
    assert selection.count.tolist() == [sum(expected)]
    if any(expected):
        assert selection.threshold.item() == scores[0][torch.tensor(expected)].min().item()


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_sets_are_selected_from_apart(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 20))
    count = data.draw(st.integers(1, 4))
    cells = {"min_size": rows * length, "max_size": rows * length}
    scores = torch.tensor(data.draw(st.lists(COARSE, **cells))).view(rows, length)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), **cells))).view(rows, length)
    sets = data.draw(st.lists(st.integers(0, count - 1), min_size=rows, max_size=rows))
    ratios = data.draw(st.lists(RATIOS, min_size=count, max_size=count))
    selection = select_top_fraction(scores, valid, ratios, torch.tensor(sets))
    assert torch.equal(selection.selected, top_of_sets(scores, valid, sets, ratios))


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
    assert count_of(ratio, number) == count
    selection = select_top_fraction(torch.randn(1, number), torch.ones(1, number).bool(), [ratio])
    assert selection.selected.sum() == selection.count == count


def test_equal_scores_keep_the_lower_positions() -> None:
    selected = select_top_fraction(torch.zeros(2, 5), torch.ones(2, 5).bool(), [0.35]).selected
    assert selected.flatten().tolist() == [True] * 4 + [False] * 6


def test_many_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(100, 1000, generator=draw)
    valid = torch.rand(100, 1000, generator=draw) > 0.1
    selection = select_top_fraction(scores, valid, [0.6])
    expected = top(scores.flatten().tolist(), valid.flatten().tolist(), 0.6)
    assert selection.selected.flatten().tolist() == expected


class Unfinished(Exception):
    """A simulated rank has come to a sum that the others have yet to add to."""


@pytest.mark.slow
@pytest.mark.parametrize("cp_size", [1, 8])
def test_merge_of_4096_ranks(cp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated in one process: every rank is run up to its next all-reduce, again and again."""
    ranks, samples, length = 4096, 1, 16
    dp_size = ranks // cp_size
    draw = torch.Generator().manual_seed(cp_size)
    scores = torch.randn(dp_size * samples, length * cp_size, generator=draw).mul(4).round()
    valid = torch.rand(scores.shape, generator=draw) > 0.2
    totals: list[Tensor] = []
    merging: list[Tensor] = []
    position = 0

    def total(counts: Tensor, placement: Placement) -> Tensor:
        nonlocal position
        position += 1
        if position <= len(totals):
            return totals[position - 1].clone()
        merging.append(counts)
        raise Unfinished

    class Group:
        def size(self) -> int:
            return ranks

    def part(whole: Tensor, dp: int, cp: int) -> Tensor:
        rows = whole[dp * samples : (dp + 1) * samples]
        chunks = rows.chunk(2 * cp_size, dim=1)
        return rows if cp_size == 1 else torch.cat([chunks[cp], chunks[-1 - cp]], dim=1)

    def run(rank: int) -> Tensor:
        nonlocal position
        position = 0
        dp, cp = divmod(rank, cp_size)
        numbers = torch.arange(dp * samples, (dp + 1) * samples)
        placement = Placement(numbers, len(scores), samples, cp, cp_size, Group())
        return select_top_fraction(
            part(scores, dp, cp), part(valid, dp, cp), [0.6], None, placement
        ).selected

    monkeypatch.setattr(top_fraction, "_total", total)
    while True:
        merging.clear()
        try:
            for rank in range(ranks):
                try:
                    run(rank)
                except Unfinished:
                    continue
                raise StopIteration
        except StopIteration:
            break
        totals.append(torch.stack(merging).sum(0).long())
    assert len(totals) == 4
    assert sum(4 * counts.numel() for counts in totals) <= 64 << 10
    expected = top(scores.flatten().tolist(), valid.flatten().tolist(), 0.6)
    whole = torch.tensor(expected).view(scores.shape)
    for rank in range(ranks):
        dp, cp = divmod(rank, cp_size)
        assert torch.equal(run(rank), part(whole, dp, cp)), rank
