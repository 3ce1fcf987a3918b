"""Scope document: exact k of each document, against a sort, and beside other scopes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed

from by_sorting import top_of_documents
from megatron_slm.selection import Choice, DocumentPlaces, Ranks, SelectionSettings, TokenSelector

COARSE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, float("inf"), -float("inf")])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(distributed.group.WORLD, distributed.group.WORLD, 0, 1)
    distributed.destroy_process_group()


def documents_of(lengths: list[list[int]]) -> DocumentPlaces:
    """Return the documents of samples that are made of documents of these lengths."""
    numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    positions = [[at for length in row for at in range(length)] for row in lengths]
    return DocumentPlaces(torch.tensor(numbers), torch.tensor(positions))


def by_cuts(cuts: list[list[int]], length: int) -> list[list[int]]:
    """Return the lengths between cuts, of which equal ones leave empty documents."""
    ends = [sorted(row) for row in cuts]
    return [
        [b - a for a, b in zip([0, *row], [*row, length], strict=True)][:length] for row in ends
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_selects_what_a_sort_selects(ranks: Ranks, data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    cells = {"min_size": rows * length, "max_size": rows * length}
    scores = torch.tensor(data.draw(st.lists(COARSE, **cells))).view(rows, length)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), **cells))).view(rows, length)
    cut = st.lists(st.integers(0, length), max_size=length - 1)
    cuts = data.draw(st.lists(cut, min_size=rows, max_size=rows))
    documents = documents_of(by_cuts(cuts, length))
    own = data.draw(st.sampled_from([(), (0.3, None, 1.0)]))
    domains = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    ratio = data.draw(st.integers(1, 1_000_000)) / 1_000_000
    selector = TokenSelector(SelectionSettings(scope="document", domain_ratios=own), ranks)
    choice = selector.choose(scores, valid, ratio, domains if own else None, documents)
    of_rows = [(own or [None] * 3)[domain] or ratio for domain in domains.tolist()]
    expected = top_of_documents(scores, valid, documents.numbers, of_rows)
    assert torch.equal(choice.selected, expected)
    assert choice.any_valid.item() == expected.any().item()


def test_500_documents_of_one_token(ranks: Ranks) -> None:
    documents = documents_of([[1] * 500, [500]])
    scores = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 500).bool()
    valid[0, ::3] = False
    choice = TokenSelector(SelectionSettings(scope="document"), ranks).choose(
        scores, valid, 0.1, None, documents
    )
    assert torch.equal(choice.selected[0], valid[0])  # of one token, one is selected
    assert choice.selected[1].sum() == 50
    lowest = [*scores[0][valid[0]].tolist(), scores[1][choice.selected[1]].min().item()]
    assert choice.threshold.item() == pytest.approx(sum(lowest) / len(lowest), abs=1e-6)


def test_no_token_may_be_selected(ranks: Ranks) -> None:
    choice = TokenSelector(SelectionSettings(scope="document"), ranks).choose(
        torch.randn(1, 6), torch.zeros(1, 6).bool(), 0.6, None, documents_of([[2, 4]])
    )
    assert not choice.selected.any() and not choice.any_valid and choice.threshold == 0


@pytest.mark.parametrize("weighting", ["hard", "relu", "softmax"])
def test_samples_of_one_document_are_sequences(ranks: Ranks, weighting: str) -> None:
    """To the bit, as far as sums of weights in another order allow it."""
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 200, generator=draw).mul(8).round().div(8)
    valid = torch.rand(3, 200, generator=draw) > 0.2
    kind = {"weighting": weighting, "unselected_weight": 0.1}

    def choose(scope: str, documents: DocumentPlaces | None) -> Choice:
        selector = TokenSelector(SelectionSettings(scope=scope, **kind), ranks)
        return selector.choose(scores, valid, 0.6, None, documents)

    found, expected = choose("document", documents_of([[200]] * 3)), choose("sequence", None)
    assert torch.equal(found.selected, expected.selected)
    torch.testing.assert_close(found.threshold, expected.threshold, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(["relu", "softmax"]))
def test_soft_weights_and_guard_of_documents(
    ranks: Ranks, data: st.DataObject, weighting: str
) -> None:
    """Each document's weights are what it would have as a sample of its own."""
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    cells = {"min_size": sum(lengths), "max_size": sum(lengths)}
    scores = torch.tensor([data.draw(st.lists(st.integers(-40, 40), **cells))]) / 10
    valid = torch.tensor([data.draw(st.lists(st.booleans(), **cells))])
    kind = {"weighting": weighting, "temperature": 0.5, "unselected_weight": 0.3}
    whole = TokenSelector(SelectionSettings(scope="document", **kind), ranks).choose(
        scores, valid, 0.6, None, documents_of([lengths])
    )
    alone = TokenSelector(SelectionSettings(scope="micro-batch", **kind), ranks)
    parts: list[Tensor] = [
        alone.choose(own, may, 0.6).weights
        for own, may in zip(scores.split(lengths, 1), valid.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(whole.weights, torch.cat(parts, 1), rtol=1e-5, atol=1e-7)


def test_random_scores_and_k_do_not_depend_on_other_documents(ranks: Ranks) -> None:
    """What another document scores changes nothing."""
    selector = TokenSelector(SelectionSettings(scope="document"), ranks)
    documents = documents_of([[7, 5, 12]])
    scores, valid = torch.randn(1, 24), torch.ones(1, 24).bool()
    before = selector.choose(scores, valid, 0.5, None, documents).selected
    scores[0, :7] += 100 * torch.randn(7)
    after = selector.choose(scores, valid, 0.5, None, documents).selected
    assert torch.equal(before[0, 7:], after[0, 7:])
