"""Parameters, memory, FLOPs and time of a step, in closed form.

Sources
    activations  Korthikanti et al. 2022, arXiv 2205.05198, section 4, redone for RMSNorm, grouped
                 queries, SwiGLU and attention that keeps no scores; "plain" layers were measured
                 tensor by tensor, "te" (Transformer Engine) is from its modules' saved tensors
    schedule     Narayanan et al. 2021, arXiv 2104.04473, section 2.2: bubble and micro-batches in
                 flight, with the warm-up of megatron.core.pipeline_parallel.schedules
    states       Rajbhandari et al. 2020, arXiv 1910.02054, section 3: mixed-precision Adam, sharded
    head         megatron_slm/loss/chunked.py
n tokens of a micro-batch on a rank, h hidden, q heads x head size, kv groups x head size, f ffn,
v padded vocabulary, t tensor-parallel size, e bytes of a weight.  All bytes are a rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_slm.loss.chunked import chunk_columns
from megatron_slm.model.architecture import Architecture

FLOAT32 = 4  # bytes of what is kept in float32 whatever the weights are


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; vp: virtual stages of a rank, 1 without."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True)
class Work:
    """What a step does.

    ratio: token selection ratio.  ranks_first: a forward of the policy precedes the step, to rank
    the tokens of the global batch.  weight_bytes: e.  optimizer_bytes: of Adam for a parameter.
    kernels: whose layers.  fused_gradients: weight gradients go straight into the buffer.
    recompute: layers whose activations are recomputed together; 0 for none.
    """

    sequence: int
    micro_batch: int
    global_batch: int
    padded_vocabulary: int
    ratio: float = 1.0
    ranks_first: bool = False
    head: Literal["dense", "chunked"] = "chunked"
    weight_bytes: int = 2
    gradient_bytes: int = 4
    optimizer_bytes: int = 12
    kernels: Literal["plain", "te"] = "te"
    fused_gradients: bool = True
    recompute: int = 0
    device: Literal["cpu", "cuda"] = "cuda"

    def micro_batches(self, layout: Layout) -> int:
        return self.global_batch // (self.micro_batch * layout.dp)

    def tokens(self, layout: Layout) -> int:
        """n."""
        return self.sequence * self.micro_batch // layout.cp


@dataclass(frozen=True)
class ReferenceModel:
    """A model that scores on the policy's ranks.

    parameter_bytes: what a rank holds of a parameter.  streamed: layers stay in the host's memory,
    and two at a time are here.  where: it comes from, in words.
    """

    architecture: Architecture
    parameter_bytes: int
    streamed: bool = False
    where: str = ""


def layer_parameters(a: Architecture) -> int:
    """q, k, v and output projection, gate, up and down projection, two norms."""
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    return a.hidden * (2 * query + 2 * key) + 3 * a.hidden * a.ffn + 2 * a.hidden


def parameters(a: Architecture, padded_vocabulary: int) -> int:
    """Of the whole model, padding of the vocabulary included."""
    tables = (1 if a.tied else 2) * padded_vocabulary * a.hidden
    return a.layers * layer_parameters(a) + tables + a.hidden


def stage_parameters(a: Architecture, padded_vocabulary: int, layout: Layout, stage: int) -> int:
    """Of one rank of a pipeline stage.  Norms are whole on every tensor-parallel rank."""
    layers = a.layers // layout.pp
    norms = 2 * layers * a.hidden
    count = (layers * layer_parameters(a) - norms) // layout.tp + norms
    table = padded_vocabulary * a.hidden // layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    if last:
        count += a.hidden
    # Tied embeddings are one matrix where first and last stage are one, else a copy each.
    return count + table * (first + last - (first and last and a.tied))


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part."""

    policy: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def memory(
    a: Architecture, references: Sequence[ReferenceModel], layout: Layout, work: Work, stage: int
) -> Memory:
    """At the peak of a step.

    References run before the policy keeps anything, so of them the weights alone count.
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
        activations=activations + max(0, backward - head),  # they peak one after the other
        head=head,
    )


def reference_bytes(reference: ReferenceModel, layout: Layout, work: Work, stage: int) -> int:
    """Weights of a reference on a rank."""
    a = reference.architecture
    if reference.streamed:
        return 2 * layer_parameters(a) // layout.tp * reference.parameter_bytes
    count = stage_parameters(a, work.padded_vocabulary, layout, stage)
    return count * reference.parameter_bytes


def layer_activation_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """What a layer keeps of a micro-batch for its backward.

    Norms, twice: input, output, and in plain layers the normalised input, those in float32.
    Attention: rotated q and k, v as a view of the fused q, k and v, output, log-sum-exp.
    MLP: gate and up, their product; in plain layers also silu(gate) and a copy of the product.
    """
    e, t, n = work.weight_bytes, layout.tp, work.tokens(layout)
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    plain = work.kernels == "plain"
    norms = 2 * ((2 * FLOAT32 + e if plain else 2 * e) * a.hidden + FLOAT32)
    attention = e * (3 * query + 3 * key) + FLOAT32 * a.heads
    mlp = (5 if plain else 3) * e * a.ffn
    rope = 4 * work.sequence * a.head_dim * e if plain else 0
    return n * (norms // (t if layout.sequence_parallel else 1) + (attention + mlp) // t) + rope


def chunks_in_flight(layout: Layout, work: Work, stage: int) -> int:
    """Forward passes of a (virtual) stage whose backward is still to come, at most."""
    micro_batches = work.micro_batches(layout)
    if layout.vp == 1:
        return min(micro_batches, layout.pp - stage)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp
    return min(micro_batches * layout.vp, warm_up + 1)


def activation_bytes(a: Architecture, layout: Layout, work: Work, stage: int) -> tuple[int, int]:
    """Kept for the backward by all micro-batches in flight, and needed on top while a layer's
    backward runs."""
    e, n = work.weight_bytes, work.tokens(layout)
    split = layout.tp if layout.sequence_parallel else 1
    layers = a.layers // (layout.pp * layout.vp)
    layer = layer_activation_bytes(a, layout, work)
    backward = 3 * n * a.ffn * e // layout.tp
    if work.recompute:
        groups = -(-layers // work.recompute)
        chunk = groups * n * a.hidden * e // split
        backward += min(work.recompute, layers) * layer
    else:
        chunk = layers * layer
    kept = chunks_in_flight(layout, work, stage) * chunk
    if stage == layout.pp - 1:  # the final norm, as a layer's
        plain = work.kernels == "plain"
        kept += n * (2 * FLOAT32 + e if plain else 2 * e) * a.hidden // split
    return kept, backward


def head_bytes(a: Architecture, layout: Layout, work: Work) -> int:
    """Output layer and loss: what is kept and what lives for a moment, at the higher of the peaks
    of forward and backward."""
    e, n = work.weight_bytes, work.tokens(layout)
    columns = work.padded_vocabulary // layout.tp
    gathered = n * a.hidden * e if layout.sequence_parallel else 0
    weight_gradient = 0 if work.fused_gradients else columns * a.hidden * e
    if work.head == "dense":
        # float32 softmax, and in half precision the logits, whose place their gradient takes
        logits = n * columns * (FLOAT32 + (e if e < FLOAT32 else 0))
        return gathered + logits + weight_gradient + n * a.hidden * e
    selected = int(n * work.ratio)
    kept = gathered + selected * a.hidden * e + 24 * selected

    def chunk(rows: int) -> int:
        return rows * min(columns, chunk_columns(rows, work.device)) * FLOAT32

    backward = chunk(selected) + weight_gradient + selected * a.hidden * e
    return kept + max(chunk(n), backward)


def forward_flops(
    a: Architecture, tokens: int, sequence: int, *, causal: bool = True
) -> tuple[int, int]:
    """Of the layers' projections and of their attention, two for each multiplication.

    Args:
        causal: half of the attention's products are masked, and good kernels leave them out.
    """
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    projections = 2 * (a.hidden * (2 * query + 2 * key) + 3 * a.hidden * a.ffn)
    seen = sequence if a.window is None or not causal else min(sequence, 2 * a.window)
    attention = 2 * 2 * query * seen // (2 if causal else 1)
    return a.layers * tokens * projections, a.layers * tokens * attention


def step_flops(
    a: Architecture, references: Sequence[Architecture], work: Work, *, causal: bool = True
) -> int:
    """Of a step over the global batch: what is computed, recomputation included.

    Backward takes twice the forward, and half a forward more of attention, whose scores are not
    kept (Dao et al. 2022, arXiv 2205.14135, section 3.1).
    """
    tokens = work.global_batch * work.sequence
    projections, attention = forward_flops(a, tokens, work.sequence, causal=causal)
    head = tokens * a.hidden * work.padded_vocabulary
    # The chunked head computes logits of all tokens, then again and two gradients of the selected.
    total = 6 * head if work.head == "dense" else int((2 + 6 * work.ratio) * head)
    total += 3 * projections + 7 * attention // 2
    if work.recompute:
        total += projections + attention
    for reference in (*references, *[a] * work.ranks_first):
        total += sum(forward_flops(reference, tokens, work.sequence, causal=causal))
        total += 2 * tokens * reference.hidden * work.padded_vocabulary
    return total


def bubble(layout: Layout, work: Work) -> float:
    """Idle time of the pipeline by its busy time."""
    return (layout.pp - 1) / (layout.vp * work.micro_batches(layout))
