"""How long a step takes on a cluster, roughly, and which layouts are worth trying.

    step = sum over policy and references of
               (compute + gradient accumulation + tensor-parallel traffic + pipeline traffic)
                   x (1 + bubble)
           + what of the data-parallel traffic half of the policy's compute does not hide

References have no virtual stages, and so the longer bubble.  Collectives are counted as in
Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: two gathers and two scatters of [n, h] a
layer forward and as many backward.  Each takes a latency beside its bytes, and each micro-batch
reads and writes the policy's gradients once: both are why larger micro-batches take less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_slm.model.architecture import Architecture
from megatron_slm.planning.formulas import (
    Layout,
    Memory,
    ReferenceModel,
    Work,
    bubble,
    memory,
    stage_parameters,
    step_flops,
)

USABLE = 0.92  # of a GPU's memory: the rest is the driver's, NCCL's, and lost between tensors


@dataclass(frozen=True)
class Cluster:
    """memory in bytes, flops a second at peak, efficiency: what matrix products reach of it.
    memory_bandwidth: bytes a second.  node_bandwidth, network_bandwidth: bytes a second of a GPU
    within a node and between nodes.  latency: seconds that a collective takes whatever its size.
    """

    gpus: int
    gpus_per_node: int = 8
    memory: float = 80e9
    flops: float = 989e12
    efficiency: float = 0.5
    memory_bandwidth: float = 3.35e12
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    latency: float = 20e-6


@dataclass(frozen=True)
class Plan:
    """A layout, the largest rank's memory, and seconds of a step."""

    layout: Layout
    work: Work
    memory: Memory
    seconds: float

    @property
    def tokens_per_day(self) -> float:
        return self.work.global_batch * self.work.sequence / self.seconds * 86400

    def days(self, tokens: int) -> float:
        """Return what so many tokens take."""
        return tokens / self.tokens_per_day


def step_seconds(
    a: Architecture,
    references: Sequence[ReferenceModel],
    layout: Layout,
    work: Work,
    cluster: Cluster,
) -> float:
    """Of a step over the global batch."""
    e, n, micro_batches = work.weight_bytes, work.tokens(layout), work.micro_batches(layout)

    def seconds(flops: int) -> float:
        return flops / (layout.ranks * cluster.flops * cluster.efficiency)

    def traffic(model: Architecture, gathers: int, sends: int) -> float:
        """Of a model's passes: gathers and scatters of a layer, sends of a stage."""
        tensor = n * model.hidden * e * (layout.tp - 1) / layout.tp
        tensor = gathers * model.layers / layout.pp * taking(tensor, layout.tp)
        sent = sends * taking(n * model.hidden * e / layout.tp, layout.ranks)
        return micro_batches * ((tensor if layout.tp > 1 else 0) + (sent if layout.pp > 1 else 0))

    def taking(size: float, span: int) -> float:
        """Of a collective of so many bytes, or a send."""
        return cluster.latency + size / _bandwidth(span, cluster)

    count = stage_parameters(a, work.padded_vocabulary, layout, 0)
    accumulating = 2 * work.gradient_bytes * count / cluster.memory_bandwidth
    compute = seconds(step_flops(a, [], work))
    total = compute + micro_batches * accumulating
    total += traffic(a, 12 if work.recompute else 8, 2 * layout.vp)
    total *= 1 + bubble(layout, work)
    for one in references:
        model = one.architecture
        scoring = seconds(step_flops(a, [model], work)) - compute
        total += (scoring + traffic(model, 4, 1)) * (1 + bubble(replace(layout, vp=1), work))
    shared = layout.dp * layout.cp
    data = count * (work.gradient_bytes + e) * (shared - 1) / shared
    data /= _bandwidth(layout.tp * shared, cluster)
    return total + max(0.0, data - compute / 2)


def _bandwidth(span: int, cluster: Cluster) -> float:
    """Of a group whose ranks lie within `span` consecutive ones."""
    inside = span <= cluster.gpus_per_node
    return cluster.node_bandwidth if inside else cluster.network_bandwidth


def plan(
    a: Architecture,
    references: Sequence[ReferenceModel],
    layout: Layout,
    work: Work,
    cluster: Cluster,
) -> Plan:
    """Memory of the largest rank, and time."""
    stages = [memory(a, references, layout, work, stage) for stage in range(layout.pp)]
    largest = max(stages, key=lambda stage: stage.total)
    return Plan(layout, work, largest, step_seconds(a, references, layout, work, cluster))


def best_plans(
    a: Architecture, references: Sequence[ReferenceModel], work: Work, cp: int, cluster: Cluster
) -> list[Plan]:
    """All layouts that divide everything and fit, the fastest first."""
    plans = [
        plan(a, references, layout, own, cluster)
        for layout, own in _candidates(a, references, work, cp, cluster)
    ]
    fitting = [one for one in plans if one.memory.total < USABLE * cluster.memory]
    return sorted(fitting, key=lambda one: one.seconds)


def _candidates(
    a: Architecture, references: Sequence[ReferenceModel], work: Work, cp: int, cluster: Cluster
) -> Iterator[tuple[Layout, Work]]:
    models = [a, *(reference.architecture for reference in references)]
    for tp in (1, 2, 4, 8):
        if tp > cluster.gpus_per_node or any(m.groups % tp or m.ffn % tp for m in models):
            continue
        for pp in (1, 2, 4, 5, 8, 10, 16):
            dp, over = divmod(cluster.gpus, tp * pp * cp)
            if over or not dp or any(m.layers % pp for m in models):
                continue
            for vp in (1, 2, 4, 5) if pp > 1 else (1,):
                if a.layers % (pp * vp):
                    continue
                layout = Layout(tp, pp, vp, cp, dp, tp > 1, True)
                for micro_batch in (1, 2, 4, 8, 16):
                    if work.global_batch % (micro_batch * dp):
                        continue
                    own = replace(work, micro_batch=micro_batch)
                    if vp > 1 and own.micro_batches(layout) % pp:
                        continue
                    yield layout, replace(own, recompute=0)
                    yield layout, replace(own, recompute=1)
