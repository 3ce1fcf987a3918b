"""The FLOPs that Megatron logs for packed samples are those of their documents."""

from __future__ import annotations

import pytest
import torch
from megatron.training.training import consume_seqlen_stats_in_iteration

from megatron_slm.model.documents import documents_at
from megatron_slm.training.micro_batch import MicroBatch, tell_lengths


def test_attention_is_counted_within_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    for to_the_device in ("pin_memory", "cuda"):  # there is none here
        monkeypatch.setattr(torch.Tensor, to_the_device, lambda tensor, **_: tensor)
    bounds = [[0, 3, 8], [0, 8], [0, 1, 2, 8]]
    ends = torch.tensor([(each + [8] * 9)[:9] for each in bounds], dtype=torch.int32)
    for at in (slice(0, 2), slice(2, 3)):
        tell_lengths(MicroBatch(0, packed=documents_at(bounds[at], ends[at], 8)))
    squares = sum(length**2 for length in (3, 5, 8, 1, 1, 6))
    assert consume_seqlen_stats_in_iteration() == (24.0, squares)


def test_whole_samples_are_left_to_megatron() -> None:
    tell_lengths(MicroBatch(0))
    assert consume_seqlen_stats_in_iteration() == (None, None)
