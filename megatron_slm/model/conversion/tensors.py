"""Map Hugging Face tensors to Megatron tensors.

Megatron stacks the tensors of all layers along a leading axis, fuses queries, keys and values group
by group, and stacks the gate projection on the up projection.  A Block is the unit of conversion:
the part of a Megatron tensor that is made from one Hugging Face tensor, or from three for the fused
attention.  The names are those on disk, which local and Transformer Engine layers share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.model.architecture import Architecture
from megatron_slm.model.families import FAMILIES

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

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

# The same for what a mixture of experts has in place of an MLP and the norm fused with it; {block}
# and the names of an expert's projections are the family's.
MIXTURE_TABLE: tuple[tuple[str, str, int | None], ...] = (
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", None),
    ("mlp.router.weight", "{block}.gate.weight", None),
    ("mlp.shared_experts.gate_weight", "{block}.shared_expert_gate.weight", None),
    ("mlp.shared_experts.linear_fc1.weight", "{block}.shared_expert.gate_proj.weight", 0),
    ("mlp.shared_experts.linear_fc1.weight", "{block}.shared_expert.up_proj.weight", 1),
    ("mlp.shared_experts.linear_fc2.weight", "{block}.shared_expert.down_proj.weight", None),
)
EXPERT = "mlp.experts.experts."
EXPERT_TABLE: tuple[tuple[str, str, int | None], ...] = (
    (f"{EXPERT}linear_fc1.weight", "{block}.experts.{expert}.{gate}.weight", 0),
    (f"{EXPERT}linear_fc1.weight", "{block}.experts.{expert}.{up}.weight", 1),
    (f"{EXPERT}linear_fc2.weight", "{block}.experts.{expert}.{down}.weight", None),
)


# Modules that keep "extra state" (fp8 scales) in a checkpoint with some version of Megatron or
# Transformer Engine; each version requires its own to be there.
ATTENTION_MODULES = ("linear_qkv", "linear_proj", "core_attention")
QK_NORMS = ("q_layernorm", "k_layernorm")
LINEARS = ("linear_fc1", "linear_fc2")
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
    leading: int = 0
    """Number of axes in front, of layers and experts, that the Hugging Face tensors lack."""

    @property
    def inner(self) -> tuple[int, ...]:
        """The block's shape without the axes of layers and experts."""
        return self.size[self.leading :]


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
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocabulary, a.hidden)}
    for index in range(a.layers):
        own = layer | (_mixture_shapes(a) if is_mixture(a, index) else _mlp_shapes(a, "mlp", a.ffn))
        shapes |= {f"model.layers.{index}.{name}": size for name, size in own.items()}
    shapes["model.norm.weight"] = (a.hidden,)
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocabulary, a.hidden)
    return shapes


def is_mixture(a: Architecture, layer: int) -> bool:
    """Return whether a layer, counted from 0, is a mixture of experts."""
    return a.experts is not None and a.experts.layers[layer]


def _mlp_shapes(
    a: Architecture, module: str, ffn: int, names: tuple[str, ...] = PROJECTIONS
) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{module}.{name}.weight" for name in names)
    return {gate: (ffn, a.hidden), up: (ffn, a.hidden), down: (a.hidden, ffn)}


def _mixture_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    assert a.experts is not None
    named, e = FAMILIES[a.family].mixtures, a.experts
    shapes: dict[str, tuple[int, ...]] = {f"{named.block}.gate.weight": (e.count, a.hidden)}
    for expert in range(e.count):
        module = f"{named.block}.experts.{expert}"
        shapes |= _mlp_shapes(a, module, e.ffn, named.gate_up_down)
    if e.shared_ffn:
        shapes |= _mlp_shapes(a, f"{named.block}.shared_expert", e.shared_ffn)
        shapes[f"{named.block}.shared_expert_gate.weight"] = (1, a.hidden)
    return shapes


def blocks(a: Architecture, padded_vocabulary: int) -> list[Block]:
    """Return all blocks of a model, in the order of hugging_face_shapes."""
    shapes = hugging_face_shapes(a)
    result = _vocabulary_blocks(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", a, padded_vocabulary
    )
    for layer in range(a.layers):
        for short, names, half, expert in _rows(a, layer):
            full = tuple(f"model.layers.{layer}.{name}" for name in names)
            if full[0] in shapes:
                result.append(_layer_block(a, layer, short, half, expert, full, shapes))
    norm = "model.norm.weight"
    result.append(
        Block("decoder.final_layernorm.weight", shapes[norm], (0,), shapes[norm], (norm,))
    )
    if not a.tied:
        result += _vocabulary_blocks("output_layer.weight", "lm_head.weight", a, padded_vocabulary)
    return result


def _rows(
    a: Architecture, layer: int
) -> Iterator[tuple[str, tuple[str, ...], int | None, int | None]]:
    """Yield the rows of the tables for a layer, with the number of the expert in the last place."""
    mixture = is_mixture(a, layer)
    for short, names, half in LAYER_TABLE:
        if not (mixture and short.startswith("mlp.")):
            yield short, names, half, None
    if not mixture:
        return
    assert a.experts is not None
    named = FAMILIES[a.family].mixtures
    gate, up, down = named.gate_up_down
    for short, name, half in MIXTURE_TABLE:
        yield short, (name.format(block=named.block),), half, None
    for expert in range(a.experts.count):
        for short, name, half in EXPERT_TABLE:
            own = name.format(block=named.block, expert=expert, gate=gate, up=up, down=down)
            yield short, (own,), half, expert


def _layer_block(
    a: Architecture,
    layer: int,
    short: str,
    half: int | None,
    expert: int | None,
    names: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
) -> Block:
    """Return the block of a layer's tensor.

    Layers are stacked along an axis where they are alike; otherwise each has tensors of its own.
    Experts are stacked along the next.
    """
    columns = shapes[names[0]][1:]
    rows = sum(shapes[name][0] for name in names)
    alike = a.experts is None or all(a.experts.layers)
    axes = [(layer, a.layers)] if alike else []
    if expert is not None:
        assert a.experts is not None
        axes.append((expert, a.experts.count))
    at, of = tuple(at for at, _ in axes), tuple(of for _, of in axes)
    return Block(
        key=f"decoder.layers.{short}" if alike else f"decoder.layers.{layer}.{short}",
        shape=(*of, rows if half is None else 2 * rows, *columns),
        offset=(*at, (half or 0) * rows, *[0 for _ in columns]),
        size=(*[1 for _ in axes], rows, *columns),
        names=names,
        leading=len(axes),
    )


def _vocabulary_blocks(key: str, name: str, a: Architecture, padded: int) -> list[Block]:
    shape, rows = (padded, a.hidden), a.vocabulary
    result = [Block(key, shape, (0, 0), (rows, a.hidden), (name,))]
    if padded > rows:
        result.append(Block(key, shape, (rows, 0), (padded - rows, a.hidden), ()))
    return result


def extra_state_keys(a: Architecture) -> list[str]:
    """Return the names of extra states on disk, of which each layer, and each expert, has its
    own."""
    alike = a.experts is None or all(a.experts.layers)
    names = []
    for layer in range(a.layers):
        modules = [f"self_attention.{name}" for name in ATTENTION_MODULES]
        modules += [f"self_attention.{name}" for name in QK_NORMS if a.qk_norm]
        mixture = is_mixture(a, layer)
        if mixture:
            modules.append("pre_mlp_layernorm")
        if not mixture or (a.experts is not None and a.experts.shared_ffn):
            inside = "mlp.shared_experts" if mixture else "mlp"
            modules += [f"{inside}.{name}" for name in LINEARS]
        prefix, at, of = "decoder.layers.", [layer], [a.layers]
        if not alike:
            prefix, at, of = f"decoder.layers.{layer}.", [], []
        names += [_state(prefix + module, at or [0], of or [1]) for module in modules]
        if mixture and a.experts is not None:
            count = a.experts.count
            names += [
                _state(f"{prefix}{EXPERT}{name}", [*at, expert], [*of, count])
                for expert in range(count)
                for name in LINEARS
            ]
    return names + [_state(module, [0], [1]) for module in EXTRA_STATES]


def _state(module: str, at: list[int], of: list[int]) -> str:
    where, shape = (".".join(str(number) for number in numbers) for numbers in (at, of))
    return f"{module}._extra_state/shard_{where}_{shape}"


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
