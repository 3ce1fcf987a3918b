"""Count a model's parameters: all of them, those that a token passes, and those of one rank.

Tensor parallelism splits the projections of attention, MLPs and shared experts.  Norms, routers
and the gates of shared experts are not split: every tensor-parallel rank has them whole.  Routed
experts have groups of their own: expert parallelism shares them out, and each is split over the
expert-tensor-parallel ranks.
"""

from __future__ import annotations

from megatron_slm.model.architecture import Architecture
from megatron_slm.planning.job import Layout


def mixed_layers(a: Architecture) -> tuple[bool, ...]:
    """Return whether each layer is a mixture of experts."""
    return (False,) * a.layers if a.experts is None else a.experts.layers


def expert_parameters(a: Architecture, number: int | None = None) -> int:
    """Count the parameters of so many experts: gate, up and down projections.

    Args:
        a: the model's architecture.
        number: how many experts; None for all of a layer.
    """
    if a.experts is None:
        return 0
    return (a.experts.count if number is None else number) * 3 * a.hidden * a.experts.ffn


def split_parameters(a: Architecture, mixed: bool) -> int:
    """Count the parameters of a layer that tensor parallelism splits: projections of q, k, v and
    the output, with biases of the first three where the model has them, and those of the MLP or,
    in a mixture, of the shared expert."""
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    biases = (query + 2 * key) * a.qkv_bias
    ffn = a.experts.shared_ffn if mixed and a.experts is not None else a.ffn
    return a.hidden * (2 * query + 2 * key) + biases + 3 * a.hidden * ffn


def whole_parameters(a: Architecture, mixed: bool) -> int:
    """Count the parameters of a layer that every tensor-parallel rank has whole: norms, and the
    router and the gate of the shared expert."""
    norms = 2 * a.hidden + 2 * a.head_dim * a.qk_norm
    if not mixed or a.experts is None:
        return norms
    return norms + a.hidden * (a.experts.count + (a.experts.shared_ffn > 0))


def layer_parameters(a: Architecture, mixed: bool, layout: Layout) -> int:
    """Count the parameters of a layer on one rank."""
    experts = expert_parameters(a) // (layout.ep * layout.etp) if mixed else 0
    return split_parameters(a, mixed) // layout.tp + whole_parameters(a, mixed) + experts


def parameters(a: Architecture, padded_vocabulary: int) -> int:
    """Count the parameters of the whole model, with the vocabulary's padding."""
    tables = (1 if a.tied else 2) * padded_vocabulary * a.hidden
    layers = sum(layer_parameters(a, mixed, Layout()) for mixed in mixed_layers(a))
    return layers + tables + a.hidden


def active_parameters(a: Architecture, padded_vocabulary: int) -> int:
    """Count the parameters that a token passes: all but the experts that it is not sent to."""
    idle = 0 if a.experts is None else a.experts.count - a.experts.top_k
    return parameters(a, padded_vocabulary) - sum(mixed_layers(a)) * expert_parameters(a, idle)


def stage_layers(a: Architecture, layout: Layout, stage: int) -> tuple[bool, ...]:
    """Return whether each layer of a pipeline stage, of all its virtual stages, is a mixture."""
    mixed, size = mixed_layers(a), a.layers // (layout.pp * layout.vp)
    starts = (size * (virtual * layout.pp + stage) for virtual in range(layout.vp))
    return tuple(layer for start in starts for layer in mixed[start : start + size])


def stage_experts(a: Architecture, layout: Layout, stage: int) -> int:
    """Count the parameters of the routed experts of one rank of a pipeline stage."""
    layers = sum(stage_layers(a, layout, stage))
    return layers * (expert_parameters(a) // (layout.ep * layout.etp))


def stage_parameters(a: Architecture, padded_vocabulary: int, layout: Layout, stage: int) -> int:
    """Count the parameters of one rank of a pipeline stage."""
    count = sum(layer_parameters(a, mixed, layout) for mixed in stage_layers(a, layout, stage))
    table = padded_vocabulary * a.hidden // layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    if last:
        count += a.hidden
    # Tied embeddings are one matrix if the first stage is also the last; otherwise each has a copy.
    return count + table * (first + last - (first and last and a.tied))
