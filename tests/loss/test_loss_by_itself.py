"""The function of docs/your-own-script.md that computes the loss in any loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from launch import REPOSITORY

SAMPLES, LENGTH, HIDDEN, VOCABULARY = 2, 10, 16, 50


def test_mean_loss_of_selected() -> None:
    """Of 18 valid tokens, 60% are 11; loss and gradients are those of plain cross entropy."""
    page = (REPOSITORY / "docs" / "your-own-script.md").read_text()
    code = page.split("## The loss by itself")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=draw, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw, requires_grad=True)
    labels = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=draw)
    reference = torch.randn(SAMPLES, LENGTH, generator=draw)
    valid = torch.arange(LENGTH).expand(SAMPLES, -1) < LENGTH - 1
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        found = names["mean_loss_of_selected"](hidden, weight, labels, reference, valid, 0.6, group)
        gradients = torch.autograd.grad(found, (hidden, weight))
    finally:
        distributed.destroy_process_group()
    losses = cross_entropy((hidden @ weight.T).movedim(-1, 1), labels, reduction="none")
    excess = (losses.detach() - reference).masked_fill(~valid, -torch.inf).flatten()
    expected = losses.flatten()[excess.topk(11).indices].mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (hidden, weight)))
