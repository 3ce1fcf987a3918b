"""Losses and gradients in chunks are those of torch's cross entropy, on one rank and several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from launch import launch
from megatron_slm.loss import chunked


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_ranks(ranks: int, tmp_path: Path) -> None:
    run = launch(ranks, ["-m", "loss.head_ranks"], tmp_path)
    assert all("agreed" in output for output in run.outputs)


@pytest.fixture
def group() -> Iterator[distributed.ProcessGroup]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_no_logits_of_all_tokens(
    group: distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor of head and loss, forward and backward, is a chunk of logits."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 64 * 512)
    rows, hidden_size, vocabulary = 1024, 8, 512
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        scored = chunked.token_losses(hidden.detach(), weight.detach(), labels, group)
        index = torch.arange(0, rows, 2)
        loss = chunked.selected_loss(
            hidden, weight, labels, scored, index, group, reduce_hidden_gradient=False
        )
        loss.backward()
    assert largest == chunked.chunk_rows(vocabulary) * vocabulary
    expected = cross_entropy(hidden @ weight.t(), labels, reduction="none")[index].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
