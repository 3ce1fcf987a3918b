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

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# Megatron's name within a layer, Hugging Face's names, and which half of the rows (None: all).
# Models have those whose shapes hugging_face_shapes has.
LAYER_TABLE: tuple[tuple[str, tuple[str, ...], int | None], ...] = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), None),
    ("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in ATTENTION), None),
    ("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in ATTENTION), None),
    ("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), None),
    ("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), None),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), None),
    ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), None),
    ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight",), 0),
    ("mlp.linear_fc1.weight", ("mlp.up_proj.weight",), 1),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), None),
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
EXTRA_STATES_OF_QK_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
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
    q, k, v = ATTENTION
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden,),
        f"{q}.weight": (query, a.hidden),
        f"{k}.weight": (key, a.hidden),
        f"{v}.weight": (key, a.hidden),
    }
    if a.qkv_bias:
        layer |= {f"{q}.bias": (query,), f"{k}.bias": (key,), f"{v}.bias": (key,)}
    if a.qk_norm:
        layer |= {f"self_attn.{name}_norm.weight": (a.head_dim,) for name in "qk"}
    layer |= {
        "self_attn.o_proj.weight": (a.hidden, query),
        "post_attention_layernorm.weight": (a.hidden,),
        "mlp.gate_proj.weight": (a.ffn, a.hidden),
        "mlp.up_proj.weight": (a.ffn, a.hidden),
        "mlp.down_proj.weight": (a.hidden, a.ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocabulary, a.hidden)}
    for index in range(a.layers):
        shapes |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
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
            full = tuple(f"model.layers.{layer}.{name}" for name in names)
            if full[0] not in shapes:
                continue
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


def extra_state_keys(a: Architecture) -> list[str]:
    """Return the names of extra states on disk, of which each layer has its own."""
    modules = EXTRA_STATES_OF_LAYER + (EXTRA_STATES_OF_QK_NORMS if a.qk_norm else ())
    names = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{a.layers}"
        for layer in range(a.layers)
        for module in modules
    ]
    return names + [f"{module}._extra_state/shard_0_1" for module in EXTRA_STATES]


def fuse(a: Architecture, tensors: list[Tensor]) -> Tensor:
    """Make a block's rows from its Hugging Face tensors.

    Queries [heads*d, h], keys and values [groups*d, h] become [(heads + 2*groups)*d, h]: for each
    group its queries, its key and its value; so do their biases, without the h.  A single tensor is
    returned as it is.
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
