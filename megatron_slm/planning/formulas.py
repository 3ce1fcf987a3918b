"""Compute memory, FLOPs, traffic of experts and pipeline bubble in closed form, in bytes per rank.

activations  Korthikanti et al. 2022 (arXiv 2205.05198), section 4, adapted to RMSNorm, grouped
             queries, SwiGLU and attention that does not keep its scores.  "plain" layers were
             measured tensor by tensor; "te" follows what Transformer Engine's modules save.
experts      dropless and dispatched by all-to-all, each of them as popular as any other
schedule     Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, with the warm-up of
             megatron.core.pipeline_parallel.schedules
states       Rajbhandari et al. 2020 (arXiv 1910.02054), section 3: sharded mixed-precision Adam
head         megatron_slm/loss/chunked.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_slm.loss.chunked import chunk_columns
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.experts import Experts
from megatron_slm.planning.job import FLOAT32, Layout, ReferenceModel, Work
from megatron_slm.planning.parameters import (
    expert_parameters,
    layer_parameters,
    mixed_layers,
    split_parameters,
    stage_experts,
    stage_layers,
    stage_parameters,
)
from megatron_slm.planning.passes import layer_flops, values_for_selected


@dataclass(frozen=True)
class Memory:
    """Memory of a rank by part, in bytes."""

    policy: int
    """The policy's weights."""
    gradients: int
    """The policy's gradients."""
    optimizer: int
    """Optimizer states."""
    reference: int
    """Weights of the references."""
    activations: int
    """Activations kept for the backward pass, and what a layer's backward needs on top."""
    head: int
    """Output layer and loss."""

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory(
    a: Architecture, references: Sequence[ReferenceModel], layout: Layout, work: Work, stage: int
) -> Memory:
    """Estimate the memory of a rank of a pipeline stage at the peak of a step, in bytes.

    References run before the policy keeps any activations, so only their weights count.
    """
    count = stage_parameters(a, work.padded_vocabulary, layout, stage)
    experts = stage_experts(a, layout, stage)
    sharded, shared = (layout.dp * layout.cp, layout.expert_dp)
    if not layout.distributed_optimizer:
        sharded = shared = 1
    else:
        sharded, shared = (ranks // layout.optimizer_instances for ranks in (sharded, shared))
    activations, backward = activation_bytes(a, layout, work, stage)
    head = head_bytes(a, layout, work) if stage == layout.pp - 1 else 0
    return Memory(
        policy=count * work.weight_bytes,
        gradients=count * work.gradient_bytes,
        optimizer=(count - experts) * work.optimizer_bytes // sharded
        + experts * work.optimizer_bytes // shared,
        reference=sum(reference_bytes(one, layout, work, stage) for one in references),
        activations=activations + max(0, backward - head),  # they peak at different times
        head=head,
    )


def reference_bytes(reference: ReferenceModel, layout: Layout, work: Work, stage: int) -> int:
    """Return the bytes of a reference's weights on a rank of a pipeline stage."""
    a = reference.architecture
    layout = replace(layout, vp=1)
    if reference.streamed:
        largest = max(layer_parameters(a, mixed, layout) for mixed in set(mixed_layers(a)))
        return 2 * largest * reference.parameter_bytes
    count = stage_parameters(a, work.padded_vocabulary, layout, stage)
    return count * reference.parameter_bytes


def layer_activation_bytes(a: Architecture, layout: Layout, work: Work, mixed: bool = False) -> int:
    """Return the bytes that a layer keeps of a micro-batch for its backward pass.

    Two norms keep their input and output; plain layers keep the input in float32, and the
    normalised input as well.  Attention keeps the rotated q and k, the fused q, k and v (of which v
    is a view), its output and the log-sum-exp.  Norms of q and k keep a copy of their input, plain
    ones the normalised input in float32.  The MLP keeps gate and up and their product; plain
    layers also keep silu(gate) and a copy of the product.

    Args:
        a: the model's architecture.
        layout: sizes of the parallel groups.
        work: what a step does.
        mixed: whether the layer is a mixture of experts, in place of the MLP.
    """
    e, t, n = work.weight_bytes, layout.tp, work.tokens(layout)
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    plain = work.kernels == "plain"
    norms = 2 * ((2 * FLOAT32 + e if plain else 2 * e) * a.hidden + FLOAT32)
    attention = e * (3 * query + 3 * key) + FLOAT32 * a.heads
    if a.qk_norm:
        attention += (FLOAT32 if plain else e) * (query + key)
    mlp = n * (5 if plain else 3) * e * a.ffn // t
    if mixed:
        mlp = mixture_activation_bytes(a, layout, work)
    rope = 4 * work.sequence * a.head_dim * e if plain else 0
    return n * (norms // (t if layout.sequence_parallel else 1) + attention // t) + mlp + rope


def mixture_activation_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """Return the bytes that a mixture of experts keeps of a micro-batch for its backward pass.

    Experts keep their input, gate and up and their weighted product; plain ones also keep
    silu(gate), a copy of up and the product as it was.  A router keeps the scores of all experts in
    float32; where they are dispatched, plain layers keep the order of all scores, Transformer
    Engine's where each token goes to and comes from.  A shared expert keeps what an MLP does, and
    its output, which the gate multiplies.
    """
    e, plain, mixture = work.weight_bytes, work.kernels == "plain", experts_of(a)
    n = work.tokens(layout) // layout.tp  # experts need sequence parallelism
    copy = e * (a.hidden + (6 if plain else 3) * mixture.ffn // layout.etp) + 3 * FLOAT32
    router = (FLOAT32 + 8) * mixture.count + 5 * FLOAT32 * mixture.top_k
    shared = (5 if plain else 3) * e * mixture.shared_ffn
    if mixture.shared_ffn:
        shared += e * a.hidden + FLOAT32
    return copies(a, layout, work) * copy + n * (router + shared)


def experts_of(a: Architecture) -> Experts:
    """Return the mixtures of experts of a model that has them."""
    assert a.experts is not None
    return a.experts


def copies(a: Architecture, layout: Layout, work: Work) -> int:
    """Return how often the experts of a rank see a token of a micro-batch, over all tokens: each of
    a rank's tokens goes to several experts, and all ranks that split an expert see its tokens."""
    return work.tokens(layout) * experts_of(a).top_k * layout.etp // layout.tp


def chunks_in_flight(layout: Layout, work: Work, stage: int) -> int:
    """Return how many forward passes of a (virtual) stage wait for their backward at most."""
    micro_batches = work.micro_batches(layout)
    if layout.vp == 1:
        return min(micro_batches, layout.pp - stage)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp
    return min(micro_batches * layout.vp, warm_up + 1)


def activation_bytes(a: Architecture, layout: Layout, work: Work, stage: int) -> tuple[int, int]:
    """Return the bytes that all micro-batches in flight keep for the backward pass, and the bytes
    that are needed on top while a layer's backward runs."""
    e, n = work.weight_bytes, work.tokens(layout)
    split = layout.tp if layout.sequence_parallel else 1
    of_stage = stage_layers(a, layout, stage)
    layers = len(of_stage) // layout.vp
    of_kind = {mixed: layer_activation_bytes(a, layout, work, mixed) for mixed in set(of_stage)}
    backward = max(backward_bytes(a, layout, work, mixed) for mixed in of_kind)
    through = work.ratio if work.backward == "selected" else 1.0
    if through < 1.0:
        kept_values = values_for_selected(a, layout.tp, split, work.recompute > 0)
        chunk = layers * n * e * kept_values
        backward = int(through * (backward + max(of_kind.values())))
    else:
        recomputed = round(work.run_again * layers)
        kept_whole = (mixed for at, mixed in enumerate(of_stage) if at % layers >= recomputed)
        chunk = sum(of_kind[mixed] for mixed in kept_whole) // layout.vp
        chunk += -(-recomputed // max(1, work.recompute)) * n * a.hidden * e // split
        if recomputed == layers:  # otherwise a layer that keeps its own is at the peak
            backward += min(work.recompute, layers) * max(of_kind.values())
    kept = chunks_in_flight(layout, work, stage) * chunk
    if stage == layout.pp - 1:  # the final norm keeps what a layer's norm does
        plain = work.kernels == "plain"
        kept += n * (2 * FLOAT32 + e if plain else 2 * e) * a.hidden // split
    return kept, backward


def backward_bytes(a: Architecture, layout: Layout, work: Work, mixed: bool) -> int:
    """Return the bytes that a layer's backward pass needs at its peak: gradients of gate, up and
    product, and with experts also those of the tokens that they see and return."""
    e = work.weight_bytes
    if not mixed:
        return 3 * work.tokens(layout) * a.ffn * e // layout.tp
    wide = 2 * a.hidden + 3 * experts_of(a).ffn // layout.etp
    return copies(a, layout, work) * wide * e


def head_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """Return the bytes of output layer and loss, at the higher peak of forward and backward."""
    e, n = work.weight_bytes, work.tokens(layout)
    columns = work.padded_vocabulary // layout.tp
    gathered = n * a.hidden * e if layout.sequence_parallel else 0
    weight_gradient = 0 if work.fused_gradients else columns * a.hidden * e
    if work.head == "dense":
        # The float32 softmax; in half precision also the logits, which their gradient overwrites.
        logits = n * columns * (FLOAT32 + (e if e < FLOAT32 else 0))
        return gathered + logits + weight_gradient + n * a.hidden * e
    selected = int(n * work.ratio)
    kept = gathered + selected * a.hidden * e + 24 * selected

    def chunk(rows: int) -> int:
        return rows * min(columns, chunk_columns(rows, work.device)) * FLOAT32

    backward = chunk(selected) + weight_gradient + selected * a.hidden * e
    return kept + max(chunk(n), backward)


def forward_flops(
    a: Architecture, tokens: int, attended: float, *, causal: bool = True
) -> tuple[int, int]:
    """Count the FLOPs of a forward pass, two for each multiplication, without the output layer.

    Args:
        a: the model's architecture.
        tokens: number of tokens in all.
        attended: tokens that attend to each other, those of a sample or a document.
        causal: leave out the half of the attention that is masked, as good kernels do.

    Returns:
        FLOPs of the layers' projections, and of their attention.
    """
    query = a.heads * a.head_dim
    projections = sum(2 * projected_by(a, mixed) for mixed in mixed_layers(a))
    seen = attended if a.window is None or not causal else min(attended, 2 * a.window)
    attention = int(2 * 2 * query * seen) // (2 if causal else 1)
    return tokens * projections, a.layers * tokens * attention


def projected_by(a: Architecture, mixed: bool) -> int:
    """Return how many weights of a layer multiply a token: of a mixture, those of the token's
    experts, of the router, and of the shared expert and its gate."""
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    biases = (query + 2 * key) * a.qkv_bias
    weights = split_parameters(a, mixed) - biases
    if mixed:
        mixture = experts_of(a)
        weights += a.hidden * (mixture.count + (mixture.shared_ffn > 0))
        weights += expert_parameters(a, mixture.top_k)
    return weights


def step_flops(
    a: Architecture, references: Sequence[Architecture], work: Work, *, causal: bool = True
) -> int:
    """Count the FLOPs of a step over the global batch, including recomputation.

    Args:
        a: the policy's architecture.
        references: architectures of the models that score during the step.
        work: what a step does.
        causal: leave out the half of the attention that is masked, as good kernels do.
    """
    tokens = work.global_batch * work.sequence
    attended = work.document or work.sequence
    projections, attention = forward_flops(a, tokens, attended, causal=causal)
    head = tokens * a.hidden * work.padded_vocabulary
    # The chunked head computes the logits of all tokens; then, for the selected ones, the logits
    # again and two gradients.
    total = 6 * head if work.head == "dense" else int((2 + 6 * work.ratio) * head)
    through = work.ratio if work.backward == "selected" else 1.0
    total += layer_flops(projections, attention, work.run_again, through)
    for reference in (*references, *[a] * work.ranks_first):
        total += sum(forward_flops(reference, tokens, attended, causal=causal))
        total += 2 * tokens * reference.hidden * work.padded_vocabulary
    return total


def dispatched_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """Return the bytes that a rank sends to others in a layer's pass over a micro-batch: the hidden
    state and the weight of each token, for each of its experts that is elsewhere, and the hidden
    states that its own experts return."""
    sent = work.tokens(layout) * experts_of(a).top_k // layout.tp
    return sent * (2 * a.hidden * work.weight_bytes + FLOAT32) * (layout.ep - 1) // layout.ep


def all_to_all_bytes(
    a: Architecture, references: Sequence[Architecture], layout: Layout, work: Work
) -> int:
    """Return the bytes that a rank sends to others' experts and back in a step; a backward pass
    sends gradients as a forward pass sends tokens."""
    passes = [(a, 2 + work.run_again), *((one, 1.0) for one in references)]
    passes += [(a, 1.0)] * work.ranks_first
    total = 0.0
    for model, times in passes:
        if model.experts is not None:
            layers = sum(model.experts.layers) // layout.pp
            total += times * layers * dispatched_bytes(model, layout, work)
    return int(work.micro_batches(layout) * total)


def bubble(layout: Layout, work: Work) -> float:
    """Return the ratio of the pipeline's idle time to its busy time."""
    return (layout.pp - 1) / (layout.vp * work.micro_batches(layout))
