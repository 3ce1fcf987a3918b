"""The output processors: what order tokens have, and what they ask of the one who selects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from megatron_slm.loss import Scoring, Selecting, all_losses, loss_of_selected

SEQUENCE, BATCH, HIDDEN, VOCABULARY, PADDED = 7, 3, 8, 29, 32


class Case:
    """Inputs as GPTModel gives them, and dense float64 losses and entropies, [b, s]."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        draw = torch.Generator().manual_seed(11)
        self.hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=draw).requires_grad_()
        self.weight = torch.randn(PADDED, HIDDEN, generator=draw).requires_grad_()
        self.labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=draw)
        self.arguments: dict[str, Any] = {
            "hidden_states": self.hidden,
            "output_layer": SimpleNamespace(
                tp_group=group,
                weight=self.weight,
                sequence_parallel=False,
                gradient_accumulation_fusion=False,
                _forward_pre_hooks={},
            ),
            "output_weight": None,
            "labels": self.labels,
            "scale_logits": lambda logits: logits,
            "config": SimpleNamespace(use_mup=False),
        }

    def dense(self, vocabulary: int | None = None) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("sbh,vh->bsv", self.hidden.double(), self.weight.double())
        logits = logits[..., :vocabulary]
        losses = cross_entropy(logits.flatten(0, 1), self.labels.flatten(), reduction="none")
        return losses.view(BATCH, SEQUENCE), torch.special.entr(logits.softmax(-1)).sum(-1)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, self.weight]))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_all_losses(group: distributed.ProcessGroup) -> None:
    case = Case(group)
    for vocabulary in (None, VOCABULARY):
        losses, entropies = case.dense(vocabulary)
        close(all_losses(**case.arguments, context=Scoring(vocabulary)), losses)
        both = all_losses(**case.arguments, context=Scoring(vocabulary, entropies=True))
        close(both, torch.stack([losses, entropies]))
        assert not both.requires_grad


def test_selected_tokens(group: distributed.ProcessGroup) -> None:
    """The one who selects sees [b, s], and gets the sum and the gradient of its tokens alone."""
    case = Case(group)
    losses, entropies = case.dense()
    selected = torch.rand(BATCH, SEQUENCE) < 0.5
    selected[0, 0], selected[1, 0] = True, False
    seen: list[Tensor] = []

    def select(*scored: Tensor) -> Tensor:
        seen[:] = scored
        return selected

    for wanted in (False, True):
        loss = loss_of_selected(**case.arguments, context=Selecting(select, wanted))
        assert len(seen) == (2 if wanted else 1)
        for actual, expected in zip(seen, (losses, entropies), strict=False):
            close(actual, expected)
        close(loss.detach(), losses[selected].sum())
        for actual, expected in zip(
            case.gradients(loss), case.gradients(case.dense()[0][selected].sum()), strict=True
        ):
            close(actual, expected)


def test_weighted_tokens(group: distributed.ProcessGroup) -> None:
    """Weights multiply losses and gradients; 0 leaves a token out, 1 is a selected one."""
    case = Case(group)
    weights = torch.rand(BATCH, SEQUENCE).where(torch.rand(BATCH, SEQUENCE) < 0.5, 0.0)
    weights[2, 1] = 1.5
    loss = loss_of_selected(**case.arguments, context=Selecting(lambda losses: weights))
    expected = (case.dense()[0] * weights).sum()
    close(loss.detach(), expected)
    gradients = case.gradients(loss)
    for actual, wanted in zip(gradients, case.gradients(expected), strict=True):
        close(actual, wanted)
    assert gradients[0].transpose(0, 1)[weights == 0].count_nonzero() == 0

    selected = weights > 0
    runs = [
        loss_of_selected(**case.arguments, context=Selecting(lambda losses, of=of: of))
        for of in (selected, selected.float())
    ]
    assert runs[0].equal(runs[1])
    for of_bool, of_ones in zip(*(case.gradients(run) for run in runs), strict=True):
        assert of_bool.equal(of_ones)
