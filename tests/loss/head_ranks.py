"""One rank of test_chunked.py: the chunked head over tensor-parallel ranks, against the dense loss.

Every rank makes the same hidden states, weight and labels, keeps its rows of the weight, and checks
losses, entropies and gradients against torch's cross entropy over the whole vocabulary in float64.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss import chunked

ROWS, HIDDEN, VOCABULARY, PADDED = 97, 24, 61, 64


def dense(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and entropies of float64 logits."""
    log_p = logits.log_softmax(-1)
    return cross_entropy(logits, labels, reduction="none"), -(log_p.exp() * log_p).sum(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(dtype: torch.dtype, columns: int, tolerance: float) -> None:
    """Compare in `dtype`, `columns` to a chunk; tolerance is relative, of norms."""
    chunked.CHUNK_BYTES, chunked.MIN_COLUMNS = {"cpu": 0}, columns
    group = distributed.group.WORLD
    rank, size = group.rank(), group.size()
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=draw).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
    index = (torch.rand(ROWS, generator=draw) < 0.6).nonzero().squeeze(1)
    weights = 2.0 * torch.rand(index.shape, generator=draw) - 0.5

    mine = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    scale = lambda logits: 0.7 * logits  # noqa: E731
    logits = 0.7 * hidden.double() @ weight.double().t()
    score = partial(chunked.token_losses, hidden, weight[mine], tp_group=group, scale_logits=scale)
    # Without a limit the padding counts; with 20 tokens some ranks have none of them.
    for limit in (None, VOCABULARY, 20):
        own_labels = labels if limit != 20 else labels % 20
        losses, entropies = dense(logits[:, :limit], own_labels)
        scored = score(own_labels, vocabulary=limit, entropies=True)
        assert scored.entropies is not None
        assert relative_error(scored.losses, losses) < tolerance
        assert relative_error(scored.entropies, entropies) < tolerance
        without = score(own_labels, vocabulary=limit)
        assert without.entropies is None
        assert relative_error(without.losses, losses) < tolerance

    scored = score(labels)
    run = partial(
        chunked.selected_loss,
        labels=labels,
        scored=scored,
        index=index,
        tp_group=group,
        reduce_hidden_gradient=True,
        scale_logits=scale,
    )
    for row_weights in (None, weights):
        whole_hidden = hidden.double().requires_grad_()
        whole_weight = weight.double().requires_grad_()
        losses, _ = dense(0.7 * whole_hidden @ whole_weight.t(), labels)
        factor = 1.0 if row_weights is None else row_weights.double()
        total = (losses[index] * factor).sum()
        (3.0 * total).backward()
        assert whole_hidden.grad is not None and whole_weight.grad is not None

        own_hidden = hidden.clone().requires_grad_()
        own_weight = weight[mine].clone().requires_grad_()
        loss = run(own_hidden, own_weight, weights=row_weights)
        assert relative_error(loss.detach(), total.detach()) < tolerance
        (3.0 * loss).backward()
        assert own_hidden.grad is not None and own_weight.grad is not None
        assert own_hidden.grad.dtype == own_weight.grad.dtype == dtype
        assert relative_error(own_hidden.grad, whole_hidden.grad) < tolerance
        assert relative_error(own_weight.grad, whole_weight.grad[mine]) < tolerance

        # Fused accumulation adds to main_grad and leaves grad to be ignored.
        fused = weight[mine].clone().requires_grad_()
        fused.main_grad = torch.ones(fused.shape)
        (
            3.0 * run(own_hidden, fused, weights=row_weights, accumulate_into_main_grad=True)
        ).backward()
        assert fused.grad_added_to_main_grad
        assert relative_error(fused.main_grad - 1.0, whole_weight.grad[mine]) < tolerance

    # A frozen output layer, and a weight whose hook expects a zero to add.
    own_hidden = hidden.clone().requires_grad_()
    run(own_hidden, weight[mine]).backward()
    assert own_hidden.grad is not None
    tied = weight[mine].clone().requires_grad_()
    tied.main_grad, tied.zero_out_wgrad = torch.zeros(tied.shape), True
    run(own_hidden, tied, accumulate_into_main_grad=True).backward()
    assert tied.grad is not None and not tied.grad.any() and tied.main_grad.any()

    # Nothing selected: a zero that still carries the graph, on every rank.
    empty_hidden = hidden.clone().requires_grad_()
    empty_weight = weight[mine].clone().requires_grad_()
    empty = run(empty_hidden, empty_weight, index=torch.zeros(0, dtype=torch.long))
    empty.backward()
    assert empty.item() == 0.0
    assert empty_hidden.grad is not None and not empty_hidden.grad.any()
    assert empty_weight.grad is not None and not empty_weight.grad.any()


def main() -> None:
    """Float32 exactly, bfloat16 to its precision."""
    distributed.init_process_group("gloo")
    for columns in (7, 1024):
        check(torch.float32, columns, 1e-5)
        check(torch.bfloat16, columns, 1e-2)
    distributed.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    sys.exit(main())
