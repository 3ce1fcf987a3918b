"""Estimate how long a step takes on a cluster, and find the layouts that are worth trying.

    step = sum over policy and references of
               (compute + gradient accumulation + tensor-parallel traffic + pipeline traffic)
                   x (1 + bubble)
           + the data-parallel traffic that half of the policy's compute does not hide

References have no virtual stages and therefore a longer bubble.  Collectives follow Korthikanti et
al. 2022 (arXiv 2205.05198), section 4.2.2: per layer two gathers and two scatters of [n, h] forward
and as many backward, each with a latency.  Mixtures of experts have two all-to-alls in their place.
Context-parallel ranks exchange keys and values while attention computes, which is taken to hide it.
Every micro-batch reads and writes the gradients once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_slm.model.architecture import Architecture
from megatron_slm.planning.formulas import (
    Memory,
    bubble,
    copies,
    dispatched_bytes,
    memory,
    step_flops,
)
from megatron_slm.planning.job import Layout, ReferenceModel, Work
from megatron_slm.planning.parameters import mixed_layers, stage_experts, stage_parameters

USABLE = 0.92  # of a GPU's memory; the rest goes to the driver, NCCL and fragmentation


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a job and their network; the defaults are NVIDIA H100s."""

    gpus: int
    """Number of GPUs of the job."""

    gpus_per_node: int = 8
    """Number of GPUs in a node."""

    memory: float = 80e9
    """Memory of a GPU, in bytes."""

    flops: float = 989e12
    """Peak FLOPs of a GPU per second."""

    efficiency: float = 0.5
    """Fraction of the peak that matrix products reach."""

    memory_bandwidth: float = 3.35e12
    """Bytes per second between a GPU and its memory."""

    node_bandwidth: float = 450e9
    """Bytes per second between GPUs of a node, for each GPU."""

    network_bandwidth: float = 50e9
    """Bytes per second between nodes, for each GPU."""

    latency: float = 20e-6
    """Seconds that a collective takes regardless of its size."""


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time."""

    layout: Layout
    """Sizes of the parallel groups."""

    work: Work
    """What a step does."""

    memory: Memory
    """Memory of the rank that needs most, in bytes."""

    seconds: float
    """Time of a step."""

    @property
    def tokens_per_day(self) -> float:
        """Tokens that the job sees in a day."""
        return self.work.global_batch * self.work.sequence / self.seconds * 86400

    def days(self, tokens: int) -> float:
        """Return how many days the job takes for so many tokens."""
        return tokens / self.tokens_per_day


def step_seconds(
    a: Architecture,
    references: Sequence[ReferenceModel],
    layout: Layout,
    work: Work,
    cluster: Cluster,
) -> float:
    """Estimate the seconds of a step over the global batch.

    Args:
        a: the policy's architecture.
        references: models that score during the step.
        layout: sizes of the parallel groups.
        work: what a step does.
        cluster: the GPUs and their network.
    """
    micro_batches = work.micro_batches(layout)

    def seconds(flops: int) -> float:
        return flops / (layout.ranks * cluster.flops * cluster.efficiency)

    def traffic(model: Architecture, passes: float, sends: int) -> float:
        """Return the seconds of a model's traffic, given the number of its passes, forward or
        backward, and of sends per stage."""
        of_layers = sum(
            _layer_traffic(model, mixed, layout, work, cluster) for mixed in mixed_layers(model)
        )
        sent = work.tokens(layout) * model.hidden * work.weight_bytes / layout.tp
        sent = sends * _taking(sent, layout.ranks, cluster) if layout.pp > 1 else 0
        return micro_batches * (passes * of_layers / layout.pp + sent)

    count = stage_parameters(a, work.padded_vocabulary, layout, 0)
    accumulating = 2 * work.gradient_bytes * count / cluster.memory_bandwidth
    compute = seconds(step_flops(a, [], work))
    total = compute + micro_batches * accumulating
    total += traffic(a, 2 + work.run_again, 2 * layout.vp)
    total *= 1 + bubble(layout, work)
    for one in references:
        model = one.architecture
        scoring = seconds(step_flops(a, [model], work)) - compute
        total += (scoring + traffic(model, 1, 1)) * (1 + bubble(replace(layout, vp=1), work))
    experts = stage_experts(a, layout, 0)
    dense = _shared_out(count - experts, layout.dp * layout.cp, layout.tp, work, cluster)
    data = dense + _shared_out(experts, layout.expert_dp, layout.ep * layout.etp, work, cluster)
    return total + max(0.0, data - compute / 2)


def _layer_traffic(
    a: Architecture, mixed: bool, layout: Layout, work: Work, cluster: Cluster
) -> float:
    """Return the seconds of a layer's collectives in a pass over a micro-batch."""
    hidden = a.hidden * work.weight_bytes
    gathers = 2 if mixed and not (a.experts and a.experts.shared_ffn) else 4
    total = 0.0
    if layout.tp > 1:
        tensor = work.tokens(layout) * hidden * (layout.tp - 1) / layout.tp
        total += gathers * _taking(tensor, layout.tp, cluster)
    if mixed and layout.ep > 1:
        sent = dispatched_bytes(a, layout, work) / 2
        total += 2 * _taking(sent, layout.ep * layout.etp, cluster)
    if mixed and layout.etp > 1:
        split = copies(a, layout, work) * hidden * (layout.etp - 1) / layout.etp
        total += 2 * _taking(split, layout.etp, cluster)
    return total


def _shared_out(count: int, ranks: int, apart: int, work: Work, cluster: Cluster) -> float:
    """Return the seconds in which ranks sum the gradients of so many parameters and share the
    weights, if `apart` ranks lie between one of them and the next."""
    size = count * (work.gradient_bytes + work.weight_bytes) * (ranks - 1) / ranks
    return size / _bandwidth(apart * ranks, cluster)


def _taking(size: float, span: int, cluster: Cluster) -> float:
    """Return the seconds of a collective, or a send, of so many bytes."""
    return cluster.latency + size / _bandwidth(span, cluster)


def _bandwidth(span: int, cluster: Cluster) -> float:
    """Return the bytes per second of a group that spans so many consecutive ranks."""
    inside = span <= cluster.gpus_per_node
    return cluster.node_bandwidth if inside else cluster.network_bandwidth


def plan(
    a: Architecture,
    references: Sequence[ReferenceModel],
    layout: Layout,
    work: Work,
    cluster: Cluster,
) -> Plan:
    """Estimate the memory of the largest rank and the time of a step for one layout."""
    stages = [memory(a, references, layout, work, stage) for stage in range(layout.pp)]
    largest = max(stages, key=lambda stage: stage.total)
    return Plan(layout, work, largest, step_seconds(a, references, layout, work, cluster))


def best_plans(
    a: Architecture, references: Sequence[ReferenceModel], work: Work, cp: int, cluster: Cluster
) -> list[Plan]:
    """Find the layouts that divide the models and the batch evenly and fit into memory.

    Args:
        a: the policy's architecture.
        references: models that score during the step.
        work: what a step does; the micro-batch and recomputation vary.
        cp: context-parallel size.
        cluster: the GPUs and their network.

    Returns:
        The plans, the fastest first.
    """
    plans = [
        plan(a, references, layout, own, cluster)
        for layout, own in _candidates(a, references, work, cp, cluster)
    ]
    fitting = [one for one in plans if one.memory.total < USABLE * cluster.memory]
    return sorted(fitting, key=lambda one: one.seconds)


def _candidates(
    a: Architecture, references: Sequence[ReferenceModel], work: Work, cp: int, cluster: Cluster
) -> Iterator[tuple[Layout, Work]]:
    for layout in _layouts([a, *(one.architecture for one in references)], cp, cluster):
        for vp in (1, 2, 4, 5, 8) if layout.pp > 1 else (1,):
            if a.layers % (layout.pp * vp):
                continue
            for micro_batch in (1, 2, 4, 8, 16):
                if work.global_batch % (micro_batch * layout.dp):
                    continue
                own = replace(work, micro_batch=micro_batch, recomputed=1.0)
                if vp > 1 and own.micro_batches(layout) % layout.pp:
                    continue
                yield replace(layout, vp=vp), replace(own, recompute=0)
                yield replace(layout, vp=vp), replace(own, recompute=1)


def _layouts(models: Sequence[Architecture], cp: int, cluster: Cluster) -> Iterator[Layout]:
    """Yield the layouts without virtual stages that divide all models evenly; experts are whole."""
    counts = [model.experts.count for model in models if model.experts is not None]
    for tp in (1, 2, 4, 8):
        if tp > cluster.gpus_per_node or any(m.groups % tp or m.ffn % tp for m in models):
            continue
        for pp in (1, 2, 4, 5, 8, 10, 16):
            dp, over = divmod(cluster.gpus, tp * pp * cp)
            if over or not dp or any(m.layers % pp for m in models):
                continue
            layout = Layout(
                tp, pp, cp=cp, dp=dp, sequence_parallel=tp > 1, distributed_optimizer=True
            )
            if not counts:
                yield layout
                continue
            for ep in (1, 2, 4, 8, 16, 32, 64):
                if not (tp * cp * dp % ep or any(count % ep for count in counts)):
                    yield replace(layout, ep=ep)
