"""Layers whose backward pass costs what is selected: what they keep, and what they train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slm.model.selected_layers import SelectedLayer, _alone
from megatron_slm.training import selected_backward
from megatron_slm.training.settings import Step


class Scaling(SelectedLayer):
    """A layer of a single weight."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.tensor(3.0))
        self.whole = self.recomputes = True
        self.is_first = False
        self.shared: Any = SimpleNamespace(current=None)
        self.config: Any = SimpleNamespace(cuda_graph_impl="none")
        self.self_attention = SimpleNamespace(core_attention=SimpleNamespace(kept=None))

    def run(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        return hidden_states * self.weight


def test_layers_after_frozen_ones_are_trained() -> None:
    hidden = torch.ones(4, 1, 2)
    layer = Scaling()
    output, _ = layer(hidden)
    output.sum().backward()
    assert layer.weight.grad == hidden.sum()
    assert hidden.grad is None and not hidden.requires_grad


def test_keeps_no_more_than_it_needs() -> None:
    product = torch.randn(8, 6)
    part = product[:, 2:4]
    assert _alone(part, [product]) is part
    alone = _alone(part, [product.clone()])
    assert alone.untyped_storage().nbytes() == part.nbytes and torch.equal(alone, part)
    assert _alone(product, []) is product


@pytest.mark.parametrize("carried", [False, True])
def test_all_tokens_are_trained_on_for_certain(
    carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a threshold from the step before, some may not be, even at 100%."""
    monkeypatch.setattr(
        selected_backward, "get_args", lambda: SimpleNamespace(slm_backward="selected")
    )
    settings: Any = SimpleNamespace(selection=SimpleNamespace(domain_ratios=()))
    layer = Scaling()
    step = Step(3, True, True, 1.0, thresholds=torch.zeros(1) if carried else None)
    selected_backward.prepare_layers([torch.nn.ModuleList([layer])], step, settings)
    assert layer.whole is not carried
