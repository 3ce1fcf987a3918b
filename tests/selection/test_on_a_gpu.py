"""On a GPU nothing of a selection lies on the host: scopes, scores and weights on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_slm.selection import Ranks, SelectionSettings, Tokens, TokenSelector, top_fraction
from megatron_slm.selection import selector as selectors
from megatron_slm.selection.scores import SCORES
from megatron_slm.selection.tokens import READABLE
from megatron_slm.selection.weights import WEIGHTINGS
from megatron_slm.selection.within_documents import DocumentPlaces

SCOPES = ("micro-batch", "sequence", "document", "data-parallel", "global-batch")
METHODS = [(score, "hard") for score in SCORES] + [("excess", weight) for weight in WEIGHTINGS]
IDS = {"labels", "token_ids", "positions", "documents", "document_positions", "datasets"}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD
    yield Ranks(group, group, 0, 1, group)
    distributed.destroy_process_group()


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built for CPUs alone")
@pytest.mark.parametrize("scope", SCOPES)
def test_all_on_the_device(scope: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_fraction, "triton_kernels", lambda *_: None)  # it would need a driver

    def on_device(ratios: tuple[float, ...], device: torch.device) -> Tensor:
        return torch.tensor(ratios, dtype=torch.float64, device=device)

    monkeypatch.setattr(selectors, "_on_device", on_device)  # as would pinned memory
    with FakeTensorMode():
        losses = torch.rand(3, 16, device="cuda")
        numbers = torch.zeros_like(losses, dtype=torch.int64)
        domains = numbers[:, 0]
        known = {name: numbers if name in IDS else losses for name in READABLE - {"scores"}}
        tokens = Tokens(losses, losses > 0.1, **known)
        for (score, weighting), ratios in product(METHODS, ((), (0.5, None))):
            settings = SelectionSettings(
                scope, score=score, weighting=weighting, domain_ratios=ratios, unselected_weight=0.1
            )
            selector = TokenSelector(settings, ranks)
            scores = settings.scorer(tokens)
            places = DocumentPlaces(numbers, numbers)
            choice = selector.choose(scores, tokens.valid, 0.6, domains, places, tokens)
            share = selector.share_selected(tokens.valid, 0.6, domains, 1, False)
            for found in (*vars(choice).values(), share):
                assert found.device.type == "cuda", (score, weighting, ratios)
