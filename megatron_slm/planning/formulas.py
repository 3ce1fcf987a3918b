"""Compute parameters, memory, FLOPs and pipeline bubble in closed form; all bytes are per rank.

activations  Korthikanti et al. 2022 (arXiv 2205.05198), section 4, adapted to RMSNorm, grouped
             queries, SwiGLU and attention that does not keep its scores.  "plain" layers were
             measured tensor by tensor; "te" follows what Transformer Engine's modules save.
schedule     Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, with the warm-up of
             megatron.core.pipeline_parallel.schedules
states       Rajbhandari et al. 2020 (arXiv 1910.02054), section 3: sharded mixed-precision Adam
head         megatron_slm/loss/chunked.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_slm.loss.chunked import chunk_columns
from megatron_slm.model.architecture import Architecture
from megatron_slm.planning.passes import layer_flops, values_for_selected

FLOAT32 = 4  # bytes per value of what is float32 whatever the weights are


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    vp: int = 1
    """Virtual pipeline stages of a rank; 1 without interleaving."""
    cp: int = 1
    """Context-parallel size."""
    dp: int = 1
    """Data-parallel size."""
    sequence_parallel: bool = False
    """Whether norms are split over the tensor-parallel ranks."""
    distributed_optimizer: bool = False
    """Whether optimizer states are sharded over the data-parallel ranks."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True)
class Work:
    """What a step does."""

    sequence: int
    """Tokens of a sample."""
    micro_batch: int
    """Samples of a micro-batch."""
    global_batch: int
    """Samples of a step."""
    padded_vocabulary: int
    """Size of the vocabulary with Megatron's padding."""
    ratio: float = 1.0
    """Token selection ratio."""
    ranks_first: bool = False
    """Whether a forward pass of the policy precedes the step, to rank the global batch's tokens."""
    head: Literal["dense", "chunked"] = "chunked"
    """How the output layer and the loss are computed."""
    backward: Literal["all", "selected"] = "all"
    """The tokens that the layers' backward passes go through."""
    weight_bytes: int = 2
    """Bytes of a weight."""
    gradient_bytes: int = 4
    """Bytes of a parameter's gradient."""
    optimizer_bytes: int = 12
    """Bytes of a parameter's optimizer states."""
    kernels: Literal["plain", "te"] = "te"
    """Whether the layers are plain torch or Transformer Engine's."""
    fused_gradients: bool = True
    """Whether weight gradients are computed directly in their buffer."""
    recompute: int = 0
    """Number of layers whose activations are recomputed together; 0 for none."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Device, which decides the size of the chunked head's chunks."""
    document: float | None = None
    """Mean length of a document over its tokens; None where documents see each other."""

    def micro_batches(self, layout: Layout) -> int:
        """Return the number of micro-batches of a step on each rank."""
        return self.global_batch // (self.micro_batch * layout.dp)

    def tokens(self, layout: Layout) -> int:
        """Return n, the number of a micro-batch's tokens on each rank."""
        return self.sequence * self.micro_batch // layout.cp


@dataclass(frozen=True)
class ReferenceModel:
    """A reference model that scores on the policy's ranks."""

    architecture: Architecture
    """The model's sizes."""
    parameter_bytes: int
    """Bytes that a rank holds for each of its parameters."""
    streamed: bool = False
    """Whether layers stay in host memory, with two at a time on the device."""
    where: str = ""
    """Where the model comes from, in words."""


def layer_parameters(a: Architecture) -> int:
    """Count a layer's parameters: projections of q, k, v and the output, with biases of the first
    three where the model has them; gate, up and down projections; and norms."""
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    biases = (query + 2 * key) * a.qkv_bias
    return a.hidden * (2 * query + 2 * key) + biases + 3 * a.hidden * a.ffn + norm_parameters(a)


def norm_parameters(a: Architecture) -> int:
    """Count the parameters of a layer's norms, which every tensor-parallel rank has whole."""
    return 2 * a.hidden + 2 * a.head_dim * a.qk_norm


def parameters(a: Architecture, padded_vocabulary: int) -> int:
    """Count the parameters of the whole model, with the vocabulary's padding."""
    tables = (1 if a.tied else 2) * padded_vocabulary * a.hidden
    return a.layers * layer_parameters(a) + tables + a.hidden


def stage_parameters(a: Architecture, padded_vocabulary: int, layout: Layout, stage: int) -> int:
    """Count the parameters of one rank of a pipeline stage, which has norms whole."""
    layers = a.layers // layout.pp
    norms = layers * norm_parameters(a)
    count = (layers * layer_parameters(a) - norms) // layout.tp + norms
    table = padded_vocabulary * a.hidden // layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    if last:
        count += a.hidden
    # Tied embeddings are one matrix if the first stage is also the last; otherwise each has a copy.
    return count + table * (first + last - (first and last and a.tied))


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
    sharded = layout.dp * layout.cp if layout.distributed_optimizer else 1
    activations, backward = activation_bytes(a, layout, work, stage)
    head = head_bytes(a, layout, work) if stage == layout.pp - 1 else 0
    return Memory(
        policy=count * work.weight_bytes,
        gradients=count * work.gradient_bytes,
        optimizer=count * work.optimizer_bytes // sharded,
        reference=sum(reference_bytes(one, layout, work, stage) for one in references),
        activations=activations + max(0, backward - head),  # they peak at different times
        head=head,
    )


def reference_bytes(reference: ReferenceModel, layout: Layout, work: Work, stage: int) -> int:
    """Return the bytes of a reference's weights on a rank of a pipeline stage."""
    a = reference.architecture
    if reference.streamed:
        return 2 * layer_parameters(a) // layout.tp * reference.parameter_bytes
    count = stage_parameters(a, work.padded_vocabulary, layout, stage)
    return count * reference.parameter_bytes


def layer_activation_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """Return the bytes that a layer keeps of a micro-batch for its backward pass.

    Two norms keep their input and output; plain layers keep the input in float32, and the
    normalised input as well.  Attention keeps the rotated q and k, the fused q, k and v (of which v
    is a view), its output and the log-sum-exp.  Norms of q and k keep a copy of their input, plain
    ones the normalised input in float32.  The MLP keeps gate and up and their product; plain
    layers also keep silu(gate) and a copy of the product.
    """
    e, t, n = work.weight_bytes, layout.tp, work.tokens(layout)
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    plain = work.kernels == "plain"
    norms = 2 * ((2 * FLOAT32 + e if plain else 2 * e) * a.hidden + FLOAT32)
    attention = e * (3 * query + 3 * key) + FLOAT32 * a.heads
    if a.qk_norm:
        attention += (FLOAT32 if plain else e) * (query + key)
    mlp = (5 if plain else 3) * e * a.ffn
    rope = 4 * work.sequence * a.head_dim * e if plain else 0
    return n * (norms // (t if layout.sequence_parallel else 1) + (attention + mlp) // t) + rope


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
    layers = a.layers // (layout.pp * layout.vp)
    layer = layer_activation_bytes(a, layout, work)
    backward = 3 * n * a.ffn * e // layout.tp
    through = work.ratio if work.backward == "selected" else 1.0
    if through < 1.0:
        kept_values = values_for_selected(a, layout.tp, split, work.recompute > 0)
        chunk, backward = layers * n * e * kept_values, int(through * (backward + layer))
    elif work.recompute:
        groups = -(-layers // work.recompute)
        chunk = groups * n * a.hidden * e // split
        backward += min(work.recompute, layers) * layer
    else:
        chunk = layers * layer
    kept = chunks_in_flight(layout, work, stage) * chunk
    if stage == layout.pp - 1:  # the final norm keeps what a layer's norm does
        plain = work.kernels == "plain"
        kept += n * (2 * FLOAT32 + e if plain else 2 * e) * a.hidden // split
    return kept, backward


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
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    projections = 2 * (a.hidden * (2 * query + 2 * key) + 3 * a.hidden * a.ffn)
    seen = attended if a.window is None or not causal else min(attended, 2 * a.window)
    attention = int(2 * 2 * query * seen) // (2 if causal else 1)
    return a.layers * tokens * projections, a.layers * tokens * attention


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
    total += layer_flops(projections, attention, work.recompute > 0, through)
    for reference in (*references, *[a] * work.ranks_first):
        total += sum(forward_flops(reference, tokens, attended, causal=causal))
        total += 2 * tokens * reference.hidden * work.padded_vocabulary
    return total


def bubble(layout: Layout, work: Work) -> float:
    """Return the ratio of the pipeline's idle time to its busy time."""
    return (layout.pp - 1) / (layout.vp * work.micro_batches(layout))
