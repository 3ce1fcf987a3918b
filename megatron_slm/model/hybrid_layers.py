"""The layers of Megatron's HybridModel in plain torch, for where Transformer Engine is absent.

A hybrid model is a pattern of layers that have either attention or an MLP or experts.  Megatron
builds each from Transformer Engine's modules; here they are the halves of the layers of
layer_spec.py, with the same names in checkpoints.  Mamba's layers and gated delta nets need kernels
for GPUs, and have no plain form.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_slm.model.layer_spec import SequenceParallelNorm, check_plain, make_plain

ATTENTION = ("input_layernorm", "self_attention", "self_attn_bda", "sharded_state_dict_keys_map")
MLP = ("pre_mlp_layernorm", "mlp", "mlp_bda", "sharded_state_dict_keys_map")


class PlainHybridStack(HybridStack):
    """Megatron's stack of layers, but for the last norm, which would be Transformer Engine's."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = SequenceParallelNorm(
                config, config.hidden_size, eps=config.layernorm_epsilon
            )


def plain_hybrid_stack(config: Any) -> ModuleSpec:
    """Return the layers of all (virtual) pipeline stages.

    Args:
        config: a HybridModelConfig.

    Raises:
        UserError: for an option that only Transformer Engine offers.
    """
    check_plain(config)
    transformer = config.transformer
    dense = _plain_layer(transformer, None)
    layers: dict[str, Any] = {
        "attention_layer": ModuleSpec(TransformerLayer, submodules=_half(dense, ATTENTION)),
        "mlp_layer": ModuleSpec(MLPLayer, submodules=_half(dense, MLP)),
    }
    if transformer.num_moe_experts:
        experts = _plain_layer(transformer, transformer.num_moe_experts)
        layers["moe_layer"] = ModuleSpec(MoETransformerLayer, submodules=_half(experts, MLP))
    return ModuleSpec(PlainHybridStack, submodules=HybridStackSubmodules(**layers))


def _plain_layer(transformer: Any, experts: int | None) -> TransformerLayerSubmodules:
    """Return the parts of a layer that has both attention and an MLP, or experts.

    It has no norms of queries and keys, as Megatron's own hybrid layers have none.
    """
    layer: TransformerLayerSubmodules = get_gpt_layer_local_spec(
        num_experts=experts,
        moe_grouped_gemm=transformer.moe_grouped_gemm,
        normalization=transformer.normalization,
    ).submodules
    make_plain(layer, qk_layernorm=False)
    return layer


def _half(layer: TransformerLayerSubmodules, names: tuple[str, ...]) -> TransformerLayerSubmodules:
    return TransformerLayerSubmodules(**{name: getattr(layer, name) for name in names})
