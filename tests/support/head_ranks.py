"""One rank of test_chunked.py: the chunked head over tensor-parallel ranks, against the dense loss.

Every rank makes the same hidden states, weight and labels, keeps its rows of the weight, and checks
losses, entropies and gradients against torch's cross entropy over the whole vocabulary in float64.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss import chunked

ROWS, HIDDEN, VOCABULARY, PADDED = 41, 24, 61, 64


def dense(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and entropies of float64 logits."""
    log_p = logits.log_softmax(-1)
    return cross_entropy(logits, labels, reduction="none"), -(log_p.exp() * log_p).sum(-1)


class Case:
    """Inputs in `dtype` and this rank's part; tolerance is relative, of norms."""

    def __init__(self, dtype: torch.dtype, tolerance: float) -> None:
        self.dtype, self.tolerance = dtype, tolerance
        self.group = distributed.group.WORLD
        rank, size = self.group.rank(), self.group.size()
        draw = torch.Generator().manual_seed(7)
        self.hidden = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype)
        self.weight = torch.randn(PADDED, HIDDEN, generator=draw).to(dtype)
        self.labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
        self.index = (torch.rand(ROWS, generator=draw) < 0.6).nonzero().squeeze(1)
        self.weights = 2.0 * torch.rand(self.index.shape, generator=draw) - 0.5
        self.mine = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
        self.score = partial(
            chunked.token_losses,
            self.hidden,
            self.weight[self.mine],
            tp_group=self.group,
            scale_logits=scale,
        )
        self.loss = partial(
            chunked.selected_loss,
            labels=self.labels,
            scored=self.score(self.labels, vocabulary=VOCABULARY, with_padding=True),
            index=self.index,
            tp_group=self.group,
            reduce_hidden_gradient=True,
            scale_logits=scale,
        )

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and this rank's weight, to be differentiated by."""
        return (
            self.hidden.clone().requires_grad_(),
            self.weight[self.mine].clone().requires_grad_(),
        )

    def close(self, actual: Tensor, expected: Tensor) -> None:
        """Norm of the difference over the norm of what is expected."""
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < self.tolerance, f"{error} on {self.group.size()} ranks in {self.dtype}"


def scale(logits: Tensor) -> Tensor:
    return 0.7 * logits


def check_scores(case: Case) -> None:
    """No padding, some, and so much of it that some ranks have nothing else."""
    logits = scale(case.hidden.double() @ case.weight.double().t())
    for limit in (None, VOCABULARY, 20):
        labels = case.labels if limit != 20 else case.labels % 20
        losses, entropies = dense(logits[:, :limit], labels)
        with_padding, _ = dense(logits, labels)
        scored = case.score(labels, vocabulary=limit, entropies=True)
        assert scored.entropies is not None
        case.close(scored.losses, losses)
        case.close(scored.entropies, entropies)
        both = case.score(labels, vocabulary=limit, entropies=True, with_padding=True)
        assert both.entropies is not None
        case.close(both.trained, with_padding)
        case.close(both.maximum + both.sum_exp.log(), logits.logsumexp(-1))
        alone = case.score(labels, vocabulary=limit)
        assert alone.entropies is None
        # To the bit, whatever else is asked for.
        for other in (alone, both, case.score(labels, vocabulary=limit, with_padding=True)):
            assert torch.equal(other.losses, scored.losses)
        assert torch.equal(both.entropies, scored.entropies)
        assert torch.equal(alone.trained, alone.losses)


def check_likeliest(case: Case) -> None:
    """The entropies of the 20 likeliest tokens' softmax, with fewer than 20 on some ranks, and with
    fewer than 20 tokens in all."""
    logits = scale(case.hidden.double() @ case.weight.double().t())
    for limit in (None, VOCABULARY, 23, 9):
        labels = case.labels % (limit or VOCABULARY)
        plain = case.score(labels, vocabulary=limit, entropies=True)
        scored = case.score(labels, vocabulary=limit, with_padding=True, top_entropies=True)
        both = case.score(labels, vocabulary=limit, entropies=True, top_entropies=True)
        highest = logits[:, :limit].sort(descending=True).values[:, :20]
        assert scored.top_entropies is not None and scored.entropies is None
        case.close(scored.top_entropies, dense(highest, labels % 9)[1])
        for one, other in (
            (scored.losses, plain.losses),
            (both.losses, plain.losses),
            (both.entropies, plain.entropies),
            (both.top_entropies, scored.top_entropies),
        ):
            assert one is not None and other is not None and torch.equal(one, other)


def check_gradients(case: Case, weights: Tensor | None) -> None:
    """Check the (weighted) sum of the selected tokens' losses, with padding, and its gradients."""
    whole_hidden = case.hidden.double().requires_grad_()
    whole_weight = case.weight.double().requires_grad_()
    losses, _ = dense(scale(whole_hidden @ whole_weight.t()), case.labels)
    expected = (losses[case.index] * (1.0 if weights is None else weights.double())).sum()
    (3.0 * expected).backward()
    assert whole_hidden.grad is not None and whole_weight.grad is not None

    hidden, weight = case.leaves()
    loss = case.loss(hidden, weight, weights=weights)
    case.close(loss.detach(), expected.detach())
    (3.0 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == case.dtype
    case.close(hidden.grad, whole_hidden.grad)
    case.close(weight.grad, whole_weight.grad[case.mine])

    # Fused accumulation adds to main_grad and leaves grad to be ignored.
    hidden, fused = case.leaves()
    fused.main_grad = torch.ones(fused.shape)
    (3.0 * case.loss(hidden, fused, weights=weights, accumulate_into_main_grad=True)).backward()
    assert fused.grad_added_to_main_grad
    case.close(fused.main_grad - 1.0, whole_weight.grad[case.mine])


def check_edges(case: Case) -> None:
    """Check a frozen layer, a tied one, and a selection of nothing."""
    hidden, weight = case.leaves()
    case.loss(hidden, weight.detach()).backward()
    assert hidden.grad is not None and hidden.grad.any()

    # With fused accumulation the hook of a tied weight expects a zero to add.
    hidden, tied = case.leaves()
    tied.main_grad, tied.zero_out_wgrad = torch.zeros(tied.shape), True
    case.loss(hidden, tied, accumulate_into_main_grad=True).backward()
    assert tied.grad is not None and not tied.grad.any() and tied.main_grad.any()

    # A zero that still carries the graph, on every rank.
    hidden, weight = case.leaves()
    empty = case.loss(hidden, weight, index=torch.zeros(0, dtype=torch.long))
    empty.backward()
    assert empty.item() == 0.0
    for leaf in (hidden, weight):
        assert leaf.grad is not None and not leaf.grad.any()


def main(functions: str) -> None:
    """Float32 exactly, bfloat16 to its precision; in many chunks and in one."""
    distributed.init_process_group("gloo")
    chunked.softmax_functions = lambda device: import_module(f"megatron_slm.loss.{functions}")
    chunked.CHUNK_BYTES = {"cpu": 0}
    for columns in (17, 1024):
        chunked.MIN_COLUMNS = columns
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            case = Case(dtype, tolerance)
            check_scores(case)
            if functions == "softmax":  # which takes no part in it
                check_likeliest(case)
            check_gradients(case, weights=None)
            check_gradients(case, weights=case.weights)
            check_edges(case)
    distributed.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
