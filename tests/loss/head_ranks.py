"""One rank of test_chunked.py: the chunked head over tensor-parallel ranks, against the dense loss.

Every rank makes the same hidden states, weight and labels, keeps its rows of the weight, and checks
losses and gradients against torch's cross entropy over the whole vocabulary.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss import chunked

ROWS, HIDDEN, VOCABULARY, PADDED = 97, 24, 61, 64


def check(dtype: torch.dtype, chunk_bytes: int, tolerance: float) -> None:
    """Compare in `dtype`; a small chunk_bytes makes many chunks."""
    chunked.CHUNK_BYTES = chunk_bytes
    group = distributed.group.WORLD
    rank, size = group.rank(), group.size()
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=draw).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
    selected = torch.rand(ROWS, generator=draw) < 0.6

    whole_hidden = hidden.double().requires_grad_()
    whole_weight = weight.double().requires_grad_()
    logits = 0.7 * whole_hidden @ whole_weight.t()
    losses = cross_entropy(logits, labels, reduction="none")
    (3.0 * losses[selected].sum()).backward()
    unpadded = cross_entropy(logits[:, :VOCABULARY], labels, reduction="none")

    mine = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    local = weight[mine].clone().requires_grad_()
    own_hidden = hidden.clone().requires_grad_()
    scale = lambda logits: 0.7 * logits  # noqa: E731
    scored = chunked.token_losses(
        own_hidden.detach(), local.detach(), labels, group, scale_logits=scale
    )
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(scored.losses, losses.detach().float(), **close)
    without_padding = chunked.token_losses(
        hidden, weight[mine], labels, group, scale_logits=scale, vocabulary=VOCABULARY
    )
    torch.testing.assert_close(without_padding.losses, unpadded.detach().float(), **close)

    loss = chunked.selected_loss(
        own_hidden,
        local,
        labels,
        scored,
        selected.nonzero().squeeze(1),
        group,
        reduce_hidden_gradient=True,
        scale_logits=scale,
    )
    torch.testing.assert_close(loss.detach(), losses[selected].sum().detach().float(), **close)
    (3.0 * loss).backward()
    assert own_hidden.grad is not None and local.grad is not None
    assert own_hidden.grad.dtype == local.grad.dtype == dtype
    torch.testing.assert_close(own_hidden.grad.double(), whole_hidden.grad, **close)
    torch.testing.assert_close(local.grad.double(), whole_weight.grad[mine], **close)

    # Fused accumulation adds to main_grad and leaves grad to be ignored.
    fused = weight[mine].clone().requires_grad_()
    fused.main_grad = torch.ones(fused.shape)
    chunked.selected_loss(
        hidden.clone().requires_grad_(),
        fused,
        labels,
        scored,
        selected.nonzero().squeeze(1),
        group,
        reduce_hidden_gradient=True,
        scale_logits=scale,
        accumulate_into_main_grad=True,
    ).backward()
    assert fused.grad_added_to_main_grad
    torch.testing.assert_close(
        3.0 * (fused.main_grad.double() - 1.0), whole_weight.grad[mine], **close
    )

    # Nothing selected: a zero that still carries the graph, on every rank.
    empty_hidden = hidden.clone().requires_grad_()
    empty = chunked.selected_loss(
        empty_hidden,
        local,
        labels,
        scored,
        torch.zeros(0, dtype=torch.long),
        group,
        reduce_hidden_gradient=True,
    )
    empty.backward()
    assert empty.item() == 0.0
    assert empty_hidden.grad is not None and not empty_hidden.grad.any()


def main() -> None:
    """Float32 exactly, bfloat16 to its precision."""
    distributed.init_process_group("gloo")
    for chunk_bytes in (1, 64 << 20):
        check(torch.float32, chunk_bytes, 2e-5)
        check(torch.bfloat16, chunk_bytes, 6e-2)
    distributed.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    sys.exit(main())
