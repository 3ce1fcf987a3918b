"""Read the weights of Megatron's checkpoints for oracle.py and oracle_experts.py.

Shares no code with megatron_slm or Megatron.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def saved_weights(checkpoint: Path, scratch: Path) -> dict[str, Tensor]:
    """Read a checkpoint of layers that are all alike, by Megatron's names."""
    file = scratch / f"{checkpoint.parent.name}.pt"
    dcp_to_torch_save(str(checkpoint), str(file))
    saved: dict[str, Tensor] = torch.load(file, weights_only=False)
    return saved


def weights_outside_mlps(
    saved: dict[str, Tensor], heads: int, groups: int, tied: bool = False
) -> dict[str, Tensor]:
    """Return the weights outside the MLPs and their norms by Hugging Face's names."""
    qkv = saved["decoder.layers.self_attention.linear_qkv.weight"]
    layers, _, hidden = qkv.shape
    head_dim = qkv.shape[1] // (heads + 2 * groups)
    embedding = saved["embedding.word_embeddings.weight"]
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": saved["decoder.final_layernorm.weight"],
        "lm_head.weight": embedding if tied else saved["output_layer.weight"],
    }
    per_group = heads // groups
    for i in range(layers):
        # Rows: for every group its query heads, then its key head, then its value head.
        rows = qkv[i].view(groups, per_group + 2, head_dim, hidden)
        prefix = f"model.layers.{i}."
        weights |= {
            prefix + "self_attn.q_proj.weight": rows[:, :per_group].reshape(-1, hidden),
            prefix + "self_attn.k_proj.weight": rows[:, per_group].reshape(-1, hidden),
            prefix + "self_attn.v_proj.weight": rows[:, per_group + 1].reshape(-1, hidden),
            prefix + "self_attn.o_proj.weight": saved[
                "decoder.layers.self_attention.linear_proj.weight"
            ][i],
            prefix + "input_layernorm.weight": saved[
                "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
            ][i],
        }
    return weights
