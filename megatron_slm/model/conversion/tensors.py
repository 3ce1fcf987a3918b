"""Map Hugging Face tensors to Megatron tensors.

Megatron stacks the tensors of all layers along a leading axis, fuses queries, keys and values group
by group, and stacks the gate projection on the up projection.  A Block is the unit of conversion:
the part of a Megatron tensor that is made from one Hugging Face tensor, or from three for the fused
attention.  The names are those on disk, which local and Transformer Engine layers share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.model.architecture import Architecture

QKV = "self_attention.linear_qkv.weight"

# Megatron's name within a layer, Hugging Face's names, and which half of the rows (None: all).
LAYER_TABLE: tuple[tuple[str, tuple[str, ...], int | None], ...] = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm",), None),
    (QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj",), None),
    ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm",), None),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj",), 0),
    ("mlp.linear_fc1.weight", ("mlp.up_proj",), 1),
    ("mlp.linear_fc2.weight", ("mlp.down_proj",), None),
)

# Modules that keep "extra state" (fp8 scales) in a checkpoint with some version of Megatron or
# Transformer Engine; each version requires its own to be there.
EXTRA_STATES_OF_LAYER = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
EXTRA_STATES = ("decoder.final_layernorm",)


@dataclass(frozen=True)
class Block:
    """A part of a Megatron tensor."""

    key: str
    """Name of the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Where in it the block begins, in each dimension."""
    size: tuple[int, ...]
    """Shape of the block."""
    names: tuple[str, ...]
    """The Hugging Face tensors it is made of; empty for padding of the vocabulary."""

    @property
    def inner(self) -> tuple[int, ...]:
        """The block's shape without the axis of layers."""
        return self.size[1:] if self.key.startswith("decoder.layers.") else self.size


def hugging_face_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each Hugging Face tensor by name, in the order in which a model uses
    them."""
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    layer = {
        "input_layernorm": (a.hidden,),
        "self_attn.q_proj": (query, a.hidden),
        "self_attn.k_proj": (key, a.hidden),
        "self_attn.v_proj": (key, a.hidden),
        "self_attn.o_proj": (a.hidden, query),
        "post_attention_layernorm": (a.hidden,),
        "mlp.gate_proj": (a.ffn, a.hidden),
        "mlp.up_proj": (a.ffn, a.hidden),
        "mlp.down_proj": (a.hidden, a.ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocabulary, a.hidden)}
    for index in range(a.layers):
        shapes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    shapes["model.norm.weight"] = (a.hidden,)
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocabulary, a.hidden)
    return shapes


def blocks(a: Architecture, padded_vocabulary: int) -> list[Block]:
    """Return all blocks of a model, in the order of hugging_face_shapes."""
    shapes = hugging_face_shapes(a)
    result = _vocabulary_blocks(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", a, padded_vocabulary
    )
    for layer in range(a.layers):
        for short, names, half in LAYER_TABLE:
            full = tuple(f"model.layers.{layer}.{name}.weight" for name in names)
            rows, *columns = shapes[full[0]]
            rows = sum(shapes[name][0] for name in full)
            result.append(
                Block(
                    key=f"decoder.layers.{short}",
                    shape=(a.layers, rows if half is None else 2 * rows, *columns),
                    offset=(layer, (half or 0) * rows, *[0 for _ in columns]),
                    size=(1, rows, *columns),
                    names=full,
                )
            )
    norm = "model.norm.weight"
    result.append(
        Block("decoder.final_layernorm.weight", shapes[norm], (0,), shapes[norm], (norm,))
    )
    if not a.tied:
        result += _vocabulary_blocks("output_layer.weight", "lm_head.weight", a, padded_vocabulary)
    return result


def _vocabulary_blocks(key: str, name: str, a: Architecture, padded: int) -> list[Block]:
    shape, rows = (padded, a.hidden), a.vocabulary
    result = [Block(key, shape, (0, 0), (rows, a.hidden), (name,))]
    if padded > rows:
        result.append(Block(key, shape, (rows, 0), (padded - rows, a.hidden), ()))
    return result


def extra_state_keys(layers: int) -> list[str]:
    """Return the names of extra states on disk, of which each layer has its own."""
    names = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for layer in range(layers)
        for module in EXTRA_STATES_OF_LAYER
    ]
    return names + [f"{module}._extra_state/shard_0_1" for module in EXTRA_STATES]


def fuse(a: Architecture, tensors: list[Tensor]) -> Tensor:
    """Make a block's rows from its Hugging Face tensors.

    Queries [heads*d, h], keys and values [groups*d, h] become [(heads + 2*groups)*d, h]: for each
    group its queries, its key and its value.  A single tensor is returned as it is.
    """
    if len(tensors) == 1:
        return tensors[0]
    grouped = [tensor.view(a.groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def split(a: Architecture, block: Tensor, count: int) -> list[Tensor]:
    """Split a block into its `count` Hugging Face tensors; the inverse of fuse."""
    if count == 1:
        return [block]
    queries = a.heads // a.groups * a.head_dim
    grouped = block.view(a.groups, -1, *block.shape[1:])
    parts = grouped.split([queries, a.head_dim, a.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]
