"""Give checkpoints of plain layers the extra states that Transformer Engine's norms ask for.

These norms have an extra state, empty without fp8, and load no checkpoint that lacks it.  Plain
norms ask for none, so that checkpoints of either kind of layers load into the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_slm.model.torch_dist import NO_EXTRA_STATE

# Modules of their own with Transformer Engine too, which fuses other norms with what follows them.
SEPARATE_NORMS = (
    *("final_layernorm", "final_norm", "q_layernorm", "k_layernorm"),
    *("enorm", "hnorm"),  # of layers that predict more tokens
)
NORM_OF_EXPERTS = "pre_mlp_layernorm"  # one of these where a layer has experts
PLAIN_NORMS = (torch.nn.RMSNorm, torch.nn.LayerNorm)


@contextmanager
def extra_states(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While a checkpoint is saved: add the extra states of a model's plain norms to it."""

    def add(norm: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}_extra_state"] = NO_EXTRA_STATE

    hooks = [
        norm.register_state_dict_post_hook(add)
        for chunk in model
        for norm in _separate_norms(chunk)
        if isinstance(norm, PLAIN_NORMS)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _separate_norms(chunk: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name, module in chunk.named_modules():
        if name.endswith(SEPARATE_NORMS):
            yield module
        elif isinstance(module, TransformerLayer) and isinstance(module.mlp, MoELayer):
            yield module.get_submodule(NORM_OF_EXPERTS)
