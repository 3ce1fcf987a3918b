"""The rows of tokens that count: found in a gradient, gathered, and what each of them sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from megatron_slm.model import selected_rows
from megatron_slm.model.documents import SeparateDocuments, documents_at
from megatron_slm.model.selected_rows import SelectedRows, Sharing

LENGTH, BATCH, HIDDEN = 20, 3, 4
ENDS = torch.tensor([[0, 20, 20, 20], [0, 7, 8, 20], [0, 1, 20, 20]], dtype=torch.int32)


@pytest.fixture
def alone() -> Iterator[Sharing]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    yield Sharing(group, group, False)
    distributed.destroy_process_group()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left", [None, 5])
def test_rows(
    share: float,
    packed: bool,
    left: int | None,
    alone: Sharing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selected_rows, "QUERIES", 3)
    torch.manual_seed(1)
    counts = torch.rand(LENGTH, BATCH) < share
    counts[:, 1] &= share == 1.0 or not packed  # a sample of which nothing is selected
    gradient = torch.randn(LENGTH, BATCH, HIDDEN) * counts[..., None]
    bounds = [sorted(set(ends)) for ends in ENDS.tolist()]
    documents = documents_at(bounds, ENDS, LENGTH)
    separate = SeparateDocuments(documents) if packed else None
    rows = SelectedRows(gradient, alone, separate)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN)
    taken = rows.take(hidden)
    assert taken.shape == (max(1, int(counts.sum())), 1, HIDDEN)
    assert torch.equal(rows.put(taken, hidden), hidden * counts[..., None])
    for sample, blocks in enumerate(rows.queries(left, torch.float32)):
        seen = []
        for block in blocks:
            assert len(block.mask) <= 3
            assert (block.mask[:, 0] == 0).any() and (block.mask[:, -1] == 0).any()
            for mask in block.mask:
                seen.append({block.first + int(key) for key in (mask == 0).nonzero()})
        expected = []
        for query in counts[:, sample].nonzero().flatten().tolist():
            first = 0 if left is None else max(0, query - left)
            if packed:
                first = max(first, *(end for end in bounds[sample] if end <= query))
            expected.append(set(range(first, query + 1)))
        assert seen == expected
