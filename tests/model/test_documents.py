"""Documents of packed samples: where they are, attention within them, and what they do not see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import flatten_batch_for_packed_sequences
from torch import Tensor, distributed

from megatron_slm.errors import UserError
from megatron_slm.model.documents import (
    Documents,
    SeparateDocuments,
    document_bounds,
    documents_at,
    joined,
    packed_as_one,
)
from megatron_slm.model.layer_spec import GatheredAttention

LENGTH = 12
# As datasets have them: the end of each document, then the sample's.
ENDS = [
    [0, 5, 5, 7, *[12] * 9],  # one document of them is empty
    [0, *[12] * 12],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
]
MALFORMED = {
    "late": [1, 5, *[12] * 11],
    "falling": [0, 7, 5, *[12] * 10],
    "longer than the sample": [0, 5, *[13] * 11],
    "short": [0, 5, *[7] * 11],
    "none": [],
}


def documents(ends: list[list[int]], length: int = LENGTH) -> Documents:
    bounds = [document_bounds(row, length, "sample") for row in ends]
    return documents_at(bounds, torch.tensor(ends, dtype=torch.int32), length)


def test_places() -> None:
    found = documents(ENDS)
    assert found.bounds == [[0, 5, 7, 12], [0, 12], list(range(13))]
    assert found.numbers.tolist() == [[0] * 5 + [1] * 2 + [2] * 5, [0] * 12, list(range(12))]
    positions = [[*range(5), *range(2), *range(5)], list(range(12)), [0] * 12]
    assert found.positions.tolist() == positions
    assert found.groups == [(12, 1), (5, 2), (2, 1), (1, 12)]
    assert torch.equal(found.order[found.places], torch.arange(36))
    again = joined([documents(ENDS[:1]), documents(ENDS[1:])])
    assert again.bounds == found.bounds and torch.equal(again.numbers, found.numbers)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    with pytest.raises(UserError, match=r"sample 3 of micro-batch 0: its cu_seqlens .* length, 12"):
        document_bounds(MALFORMED[case], LENGTH, "sample 3 of micro-batch 0")


def test_one_sequence_is_megatrons() -> None:
    batch = {
        "tokens": torch.arange(36).view(3, 12),
        "cu_seqlens": torch.tensor(ENDS, dtype=torch.int32),
        "max_seqlen": torch.tensor([5, 12, 1], dtype=torch.int32),
    }
    expected = flatten_batch_for_packed_sequences(batch)
    ours = packed_as_one(documents(ENDS))
    # Megatron keeps documents without tokens, which attention passes over.
    assert torch.equal(ours.cu_seqlens_q, expected["cu_seqlens"][0].unique())
    assert ours.max_seqlen_q == expected["max_seqlen"].item()
    assert ours.cu_seqlens_q.dtype == torch.int32


@pytest.fixture
def alone() -> Iterator[SimpleNamespace]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(cp=distributed.group.WORLD)
    distributed.destroy_process_group()


def attention(groups: SimpleNamespace, window: int | None) -> GatheredAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
    )
    return GatheredAttention(config, 1, None, "self", pg_collection=groups)


def inputs(length: int, samples: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(length, samples, heads, 8, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 3])
def test_attention_within_documents(alone: SimpleNamespace, window: int | None) -> None:
    """Bit for bit that of each document by itself, and so are gradients."""
    attend, found, qkv = attention(alone, window), documents(ENDS), inputs(LENGTH, 3)
    got = attend(*qkv, None, packed_seq_params=SeparateDocuments(found))
    weight = torch.randn_like(got)
    gradients = torch.autograd.grad((got * weight).sum(), qkv)
    for sample, ends in enumerate(found.bounds):
        for start, stop in pairwise(ends):
            part = (slice(start, stop), slice(sample, sample + 1))
            own = [x[part].detach().requires_grad_() for x in qkv]
            expected = attend(*own, None)
            assert torch.equal(got[part], expected)
            theirs = torch.autograd.grad((expected * weight[part]).sum(), own)
            for mine, their in zip(gradients, theirs, strict=True):
                assert torch.equal(mine[part], their)
    masked = attend._masked(
        *(x.permute(1, 2, 0, 3) for x in qkv),
        SeparateDocuments(found).mask(window, torch.float32, alone.cp),
    )
    torch.testing.assert_close(masked.permute(2, 0, 1, 3).flatten(2), got, rtol=1e-5, atol=1e-6)


def test_single_samples_as_without(alone: SimpleNamespace) -> None:
    """Also beside a sample of several documents."""
    attend, qkv = attention(alone, None), inputs(LENGTH, 3)
    got = attend(*qkv, None, packed_seq_params=SeparateDocuments(documents(ENDS)))
    assert torch.equal(got[:, 1], attend(*qkv, None)[:, 1])


def test_hundreds_of_single_tokens(alone: SimpleNamespace) -> None:
    """Each sees itself alone."""
    ends = [list(range(501)), [0, 250, *[500] * 499]]
    query, key, value = inputs(500, 2)
    found = documents(ends, 500)
    got = attention(alone, None)(
        query, key, value, None, packed_seq_params=SeparateDocuments(found)
    )
    assert found.groups == [(250, 2), (1, 500)]
    torch.testing.assert_close(got[:, 0], value[:, 0].repeat_interleave(2, 1).flatten(1))


def test_others_do_not_matter(alone: SimpleNamespace) -> None:
    """Whatever a document's tokens are, the others' results are the same to the bit."""
    draw, length = torch.Generator().manual_seed(3), 32
    for number in range(1, 21):
        cuts = torch.randperm(length - 1, generator=draw)[:number] + 1
        ends = [0, *sorted(cuts.tolist())] + [length] * (length - number)
        found = documents([ends, [0, *[length] * length]], length)
        attend, qkv = attention(alone, None), [x.detach() for x in inputs(length, 2)]
        before = attend(*qkv, None, packed_seq_params=SeparateDocuments(found))
        changed = int(torch.randint(length, (), generator=draw))
        for x in qkv:
            x[changed, 0] += 1
        after = attend(*qkv, None, packed_seq_params=SeparateDocuments(found))
        same = (before == after).all(-1)
        others = found.numbers.t() != found.numbers[0, changed]
        others[:, 1] = True
        assert same[others].all() and not same[changed, 0]
