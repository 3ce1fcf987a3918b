"""What Transformer Engine cannot compute in fp8 is refused by name, before anything is built."""

from __future__ import annotations

from argparse import Namespace

import pytest
from megatron.core.transformer import TransformerConfig

from megatron_slm.errors import UserError
from megatron_slm.reference.fp8 import check_fp8_sizes
from megatron_slm.reference.online import frozen_arguments
from megatron_slm.training.command_line import arguments

FITTING = {
    "num_layers": 2,
    "hidden_size": 96,
    "ffn_hidden_size": 256,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
}


def check(tokens: int, **changed: int | bool) -> None:
    check_fp8_sizes(TransformerConfig(**FITTING | changed), [tokens], "the reference in DIR")


@pytest.mark.parametrize(
    ("tokens", "changed", "what"),
    [
        (2 * 66, {}, "132 tokens of a micro-batch"),
        (
            64,
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "context_parallel_size": 8,
            },
            "4 tokens of",
        ),
        (64, {"hidden_size": 104}, "104 hidden features"),
        (64, {"kv_channels": 20}, "120 features of queries"),
        (
            64,
            {
                "num_attention_heads": 8,
                "kv_channels": 4,
                "num_query_groups": 1,
                "tensor_model_parallel_size": 2,
            },
            "20 features of queries, keys and values",
        ),
        (64, {"ffn_hidden_size": 264}, "264 feed-forward units"),
        (64, {"tensor_model_parallel_size": 2, "ffn_hidden_size": 272}, "136 feed-forward units"),
    ],
)
def test_sizes(tokens: int, changed: dict[str, int | bool], what: str) -> None:
    check(64)
    with pytest.raises(UserError, match=f"the reference in DIR has {what}"):
        check(tokens, **changed)


class Unset(Namespace):
    """Arguments of which those that are not named are left out of the command line."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def test_a_dump_would_change_delayed_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "HAVE_TE", True)
    args = Unset(cuda_graph_impl="none", fp8="hybrid", fp8_recipe="delayed", slm_dump_interval=10)
    with pytest.raises(UserError, match="--fp8-recipe tensorwise, or leave --slm-dump-interval"):
        arguments.validate_arguments(args)
    for harmless in ({"fp8_recipe": "tensorwise"}, {"slm_dump_interval": None}, {"fp8": None}):
        arguments.validate_arguments(Unset(**vars(args) | harmless))


def test_offloading_would_be_learnt_from_a_pass_without_backward() -> None:
    args = Unset(cuda_graph_impl="none", fine_grained_activation_offloading=True)
    arguments.validate_arguments(args)
    for refused in ({"slm_dump_interval": 10}, {"slm_global_batch": "exact"}):
        with pytest.raises(UserError, match="fine-grained-activation-offloading cannot be used"):
            arguments.validate_arguments(Unset(**vars(args) | refused))


def test_a_reference_pads_no_experts_for_the_policys_precision() -> None:
    padded = {"moe_router_padding_for_fp8": True, "moe_router_padding_for_quantization": True}
    args = Unset(**padded, fp8="e4m3", num_experts=4, moe_layer_recompute=True)
    for fp8, experts, expected in ((None, 4, False), (True, None, False), (True, 4, True)):
        own = frozen_arguments(
            Unset(**vars(args) | {"slm_reference_fp8": fp8, "num_experts": experts})
        )
        assert [getattr(own, name) for name in padded] == [expected, expected]
        assert not own.moe_layer_recompute
    assert args.moe_layer_recompute and all(getattr(args, name) for name in padded)
