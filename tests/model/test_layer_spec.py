"""The plain layers of layer_spec.py: attention against attention written out with a mask, and what
is saved of them against what Megatron's Transformer Engine layers load."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.errors import UserError
from megatron_slm.model import layer_spec
from megatron_slm.model.layer_spec import GatheredAttention


@pytest.fixture
def alone() -> Iterator[SimpleNamespace]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(cp=distributed.group.WORLD)
    distributed.destroy_process_group()


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """[s, b, heads, d] and grouped keys and values -> [s, b, heads * d], a loop over positions."""
    length, batch, heads, width = query.shape
    per_group = heads // key.shape[2]
    result = torch.zeros(length, batch, heads, width)
    for position in range(length):
        first = 0 if window is None else max(0, position - window)
        for head in range(heads):
            keys = key[first : position + 1, :, head // per_group]
            scores = (query[position, :, head] * keys).sum(-1) / width**0.5
            weights = scores.softmax(0)[..., None]
            result[position, :, head] = (
                weights * value[first : position + 1, :, head // per_group]
            ).sum(0)
    return result.reshape(length, batch, heads * width)


def layer(groups: SimpleNamespace, window: int | None, grouped: int) -> GatheredAttention:
    """Attention of 4 heads in `grouped` groups."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=grouped,
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
    )
    return GatheredAttention(config, 1, None, "self", pg_collection=groups)


@pytest.mark.parametrize("window", [None, 3, 10, 11])  # of 12 positions the last sees 11 before it
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention(alone: SimpleNamespace, window: int | None, groups: int) -> None:
    attention = layer(alone, window, groups)
    query = torch.randn(12, 2, 4, 8, requires_grad=True)
    key, value = (torch.randn(12, 2, groups, 8, requires_grad=True) for _ in range(2))
    got = attention(query, key, value, None)
    expected = written_out(query, key, value, window)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(got)
    for tensor in (query, key, value):
        (mine,) = torch.autograd.grad((got * weight).sum(), tensor, retain_graph=True)
        (theirs,) = torch.autograd.grad((expected * weight).sum(), tensor, retain_graph=True)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "cuts"), [(None, False), (11, False), (10, True)])
def test_fused_kernels_can_take_it(
    alone: SimpleNamespace, window: int | None, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask only where it cuts something, and then no groups: both at once leave a GPU only the
    kernel that keeps all scores.  One mask serves all layers, and no table of positions is made."""
    calls: list[dict[str, Any]] = []
    attend = layer_spec.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(options | {"grouped": key.shape[1] != query.shape[1]})
        return attend(query, key, value, **options)

    class Positions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.int64:
                assert result.numel() < 12 * 12, function
            return result

    monkeypatch.setattr(layer_spec, "scaled_dot_product_attention", watched)
    layer_spec._causal_mask.cache_clear()
    query, key = torch.randn(12, 2, 4, 8), torch.randn(12, 2, 2, 8)
    with Positions():
        for _ in range(2):
            layer(alone, window, 2)(query, key, key, None)
    masks = [call.get("attn_mask") for call in calls]
    assert [mask is not None for mask in masks] == [cuts, cuts]
    assert masks[0] is masks[1]
    for call in calls:
        assert call["grouped"] == call.get("enable_gqa", False) == (not cuts)


def test_dry_runs_keep_no_mask(alone: SimpleNamespace) -> None:
    layer_spec._causal_mask.cache_clear()
    for _ in range(2):
        with FakeTensorMode():
            query, key = torch.empty(12, 2, 4, 8), torch.empty(12, 2, 2, 8)
            assert layer(alone, 3, 2)(query, key, key, None).shape == (12, 2, 32)
    assert layer_spec._causal_mask.cache_info().currsize == 0


def test_what_only_transformer_engine_offers() -> None:
    plain = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    layer_spec.check_plain(plain)
    for name in ("layernorm_zero_centered_gamma", "fp32_residual_connection"):
        config = SimpleNamespace(**vars(plain) | {name: True})
        with pytest.raises(UserError, match="needs Transformer Engine"):
            layer_spec.check_plain(config)
