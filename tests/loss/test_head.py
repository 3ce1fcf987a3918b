"""The output processors: what order tokens have, and what they ask of the one who selects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss import (
    Scoring,
    Selecting,
    Telling,
    all_losses,
    dense_losses,
    loss_of_selected,
)

SEQUENCE, BATCH, HIDDEN, VOCABULARY, PADDED = 7, 3, 8, 29, 32


class OutputLayer:
    """As much of ColumnParallelLinear as the processors use."""

    sequence_parallel = gradient_accumulation_fusion = False

    def __init__(self, weight: Tensor, group: distributed.ProcessGroup) -> None:
        self.weight, self.tp_group = weight, group
        self._forward_pre_hooks: dict[int, Any] = {}

    def __call__(self, hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, None]:
        return hidden @ self.weight.t(), None


class Case:
    """Inputs as GPTModel gives them, and dense float64 losses and entropies, [b, s]."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        def megatron_loss(labels: Tensor, logits: Tensor) -> Tensor:
            losses = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), tp_group=group)
            return losses.t().contiguous()

        draw = torch.Generator().manual_seed(11)
        self.hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=draw).requires_grad_()
        self.weight = torch.randn(PADDED, HIDDEN, generator=draw).requires_grad_()
        self.labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=draw)
        self.arguments: dict[str, Any] = {
            "hidden_states": self.hidden,
            "output_layer": OutputLayer(self.weight, group),
            "output_weight": None,
            "labels": self.labels,
            "scale_logits": lambda logits: logits,
            "compute_language_model_loss": megatron_loss,
            "config": SimpleNamespace(use_mup=False),
        }

    def dense(self, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("sbh,vh->bsv", self.hidden.double(), self.weight.double())
        logits = logits[..., :vocabulary]
        losses = cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="none")
        return losses.view(BATCH, SEQUENCE), torch.special.entr(logits.softmax(-1)).sum(-1)

    def among_likeliest(self) -> Tensor:
        logits = torch.einsum("sbh,vh->bsv", self.hidden.double(), self.weight.double())
        highest = logits[..., :VOCABULARY].sort(descending=True).values[..., :20]
        return torch.special.entr(highest.softmax(-1)).sum(-1)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.weight]))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_all_losses(group: distributed.ProcessGroup) -> None:
    case = Case(group)
    for vocabulary in (PADDED, VOCABULARY):
        losses, entropies = case.dense(vocabulary)
        for dense in (False, True):
            alone = all_losses(**case.arguments, context=Scoring(vocabulary, dense=dense))
            close(alone, losses)
            scoring = Scoring(vocabulary, entropies=True, dense=dense)
            both = all_losses(**case.arguments, context=scoring)
            close(both, torch.stack([losses, entropies]))
            assert both[0].equal(alone)
            assert not alone.requires_grad and not both.requires_grad
    scoring = Scoring(VOCABULARY, entropies=True, top_entropies=True)
    assert scoring.names == ("losses", "entropies", "top_entropies")
    every = all_losses(**case.arguments, context=scoring)
    close(every, torch.stack([*case.dense(VOCABULARY), case.among_likeliest()]))
    two = all_losses(**case.arguments, context=Scoring(VOCABULARY, top_entropies=True))
    assert two.equal(every[[0, 2]])


def test_dense_losses(group: distributed.ProcessGroup) -> None:
    """Megatron's, to the bit, and those without padding, to the bit those of a scoring pass."""
    case = Case(group)
    told: list[Tensor] = []
    context = Telling(told.append, VOCABULARY)
    trained = dense_losses(**case.arguments, context=context)
    logits = case.hidden @ case.weight.t()
    expected = case.arguments["compute_language_model_loss"](case.labels, logits)
    assert trained.equal(expected)
    for own, megatrons in zip(
        case.gradients(trained.sum()), case.gradients(expected.sum()), strict=True
    ):
        assert own.equal(megatrons)
    close(told[0], case.dense(VOCABULARY)[0])
    scored = all_losses(**case.arguments, context=Scoring(VOCABULARY, dense=True))
    assert told[0].equal(scored) and not told[0].requires_grad


def test_selected_tokens(group: distributed.ProcessGroup) -> None:
    """The one who selects sees [b, s] without padding, and gets the sum and the gradient of its
    tokens alone, with padding."""
    case = Case(group)
    trained, _ = case.dense()
    losses, entropies = case.dense(VOCABULARY)
    selected = torch.rand(BATCH, SEQUENCE) < 0.5
    selected[0, 0], selected[1, 0] = True, False
    seen: list[Tensor | None] = []

    def select(*scored: Tensor | None) -> Tensor:
        seen[:] = scored
        return selected

    scored = all_losses(**case.arguments, context=Scoring(VOCABULARY))
    for wanted in (False, True):
        loss = loss_of_selected(**case.arguments, context=Selecting(select, VOCABULARY, wanted))
        for actual, expected in zip(
            seen, (losses, entropies if wanted else None, trained), strict=True
        ):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                close(actual, expected)
        assert seen[0] is not None and seen[0].equal(scored)
        close(loss.detach(), trained[selected].sum())
        for actual, expected in zip(
            case.gradients(loss), case.gradients(case.dense()[0][selected].sum()), strict=True
        ):
            close(actual, expected)


def test_weights_of_the_likeliest_tokens(group: distributed.ProcessGroup) -> None:
    """The one who weighs is told their entropies, which have no gradient."""
    case = Case(group)

    def weigh(*_: Tensor | None, top_entropies: Tensor) -> Tensor:
        close(top_entropies, case.among_likeliest())
        return top_entropies

    loss = loss_of_selected(
        **case.arguments, context=Selecting(weigh, VOCABULARY, top_entropies=True)
    )
    expected = (case.among_likeliest().detach() * case.dense()[0]).sum()
    close(loss.detach(), expected)
    for actual, wanted in zip(case.gradients(loss), case.gradients(expected), strict=True):
        close(actual, wanted)


def test_weighted_tokens(group: distributed.ProcessGroup) -> None:
    """Weights multiply losses and gradients; 0 leaves a token out, 1 is a selected one."""
    case = Case(group)
    weights = torch.rand(BATCH, SEQUENCE).where(torch.rand(BATCH, SEQUENCE) < 0.5, 0.0)
    weights[2, 1] = 1.5
    loss = loss_of_selected(**case.arguments, context=Selecting(lambda *_: weights))
    expected = (case.dense()[0] * weights).sum()
    close(loss.detach(), expected)
    gradients = case.gradients(loss)
    for actual, wanted in zip(gradients, case.gradients(expected), strict=True):
        close(actual, wanted)
    assert gradients[0].transpose(0, 1)[weights == 0].count_nonzero() == 0

    selected = weights > 0
    runs = [
        loss_of_selected(**case.arguments, context=Selecting(lambda *_, of=of: of))
        for of in (selected, selected.float())
    ]
    assert runs[0].equal(runs[1])
    for of_bool, of_ones in zip(*(case.gradients(run) for run in runs), strict=True):
        assert of_bool.equal(of_ones)
