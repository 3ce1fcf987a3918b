"""Formulas of planning against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_slm.model.architecture import Architecture
from megatron_slm.model.experts import Experts
from megatron_slm.planning.cluster import Cluster, step_seconds
from megatron_slm.planning.formulas import (
    activation_bytes,
    all_to_all_bytes,
    layer_activation_bytes,
    memory,
    step_flops,
)
from megatron_slm.planning.job import Layout, ReferenceModel, Work
from megatron_slm.planning.parameters import parameters

SHAPE = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None, "tied": False}


def test_flops_of_slm_by_those_of_clm() -> None:
    """The model of tests/benchmarks/slm_step.py, matrix by matrix, in multiplications of a token:
    forward 1, backward 2 of each product, and half of a causal attention's."""
    a = Architecture(8, 512, 1344, 8, 8, 64, 32000, 512, **SHAPE)
    work = Work(512, 1, 2, 32000, ratio=0.6)
    projections = 8 * (4 * 512 * 512 + 3 * 512 * 1344)  # q, k, v, out; gate, up, down
    attention = 8 * 2 * 512 * 512 / 2  # scores and their sum of values, of 512 tokens
    head = 512 * 32000
    assert (projections, attention, head) == (24_903_680, 2_097_152, 16_384_000)
    # Attention's scores are computed again in the backward: half a forward more.
    layers = 3 * projections + 3.5 * attention
    clm = layers + 3 * head
    # All tokens' logits, the selected ones' again, and two gradients of these.
    cached = layers + (1 + 3 * 0.6) * head
    slm = cached + projections + attention + head
    found = [
        step_flops(a, scoring, one)
        for scoring, one in (([], replace(work, ratio=1.0, head="dense")), ([], work), ([a], work))
    ]
    assert found == pytest.approx([2 * 1024 * part for part in (clm, cached, slm)], rel=1e-6)
    # Measured: 1.264 of CLM's time (tests/benchmarks/RESULTS.md).
    assert found[2] / found[0] == pytest.approx(1.264, rel=0.05)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "published"),
    [(1, False, 34), (8, True, 34 / 8), (8, False, 10 + 24 / 8)],
)
def test_bytes_that_a_layer_keeps(tp: int, sequence_parallel: bool, published: float) -> None:
    """In bf16 with Transformer Engine, by Korthikanti et al. (arXiv 2205.05198), equations 1, 2 and
    4, without the 5as/h of attention's scores, which flash attention does not keep: sbh(34), of
    which norms, dropout and inputs of the two blocks are sbh(10), and tensor parallelism divides
    the rest.

    Gate, up and their product of 8/3 h are the 16 bytes of a 4h MLP.  Two things differ: there is
    no dropout, whose masks are 2 of the 10, and there are rotated queries and keys, 4.
    """
    a = Architecture(1, 3072, 8192, 24, 24, 128, 32000, 4096, **SHAPE)
    work, layout = Work(4096, 2, 8, 32000), Layout(tp=tp, sequence_parallel=sequence_parallel)
    sbh = 4096 * 2 * 3072
    found = layer_activation_bytes(a, layout, work) / sbh
    masks = 2 / tp if sequence_parallel else 2
    assert found == pytest.approx(published - masks + 4 / tp, rel=0.01)
    assert found == pytest.approx(published, rel=0.12)
    # Recomputed in full, 2sbh (table 2), divided with sequence parallelism.
    kept, _ = activation_bytes(replace(a, layers=10), layout, replace(work, recompute=1), 0)
    norm = 2 * 2 * sbh  # the final one
    split = tp if sequence_parallel else 1
    assert kept == pytest.approx((10 * 2 * sbh + norm) / split, rel=0.01)


def test_bytes_of_a_parameter() -> None:
    """Megatron's published 18 bytes in bf16 with float32 gradients, and 6 + 12/d with the
    distributed optimizer (its guide, "Distributed Optimizer")."""
    a = Architecture(4, 1024, 2816, 8, 8, 128, 32000, 2048, **SHAPE)
    work = Work(2048, 1, 64, 32000)
    for layout, published in (
        (Layout(dp=16), 18),
        (Layout(dp=16, distributed_optimizer=True), 6 + 12 / 16),
    ):
        found = memory(a, [ReferenceModel(a, 2)], layout, work, 0)
        count = parameters(a, 32000)
        assert found.policy + found.gradients + found.optimizer == published * count
        assert found.reference == 2 * count


def test_references_wait_longer_for_their_pipeline() -> None:
    """They have no virtual stages.  Without traffic: each model's compute, and its bubble."""
    free = {"node_bandwidth": math.inf, "memory_bandwidth": math.inf, "latency": 0.0}
    a = Architecture(16, 1024, 2816, 8, 8, 128, 32000, 2048, **SHAPE)
    work, layout = Work(2048, 1, 8, 32000, ratio=0.6), Layout(pp=4, vp=2)
    still = Cluster(4, flops=1e15, efficiency=0.5, **free)
    policy, both = (step_flops(a, scoring, work) / (4 * 0.5e15) for scoring in ([], [a]))
    found = step_seconds(a, [ReferenceModel(a, 2)], layout, work, still)
    assert found == pytest.approx(policy * (1 + 3 / 16) + (both - policy) * (1 + 3 / 8))
    # A node away, each of the 8 micro-batches is sent twice 2 times by the policy, and once by the
    # reference: 2048 x 1024 numbers of 2 bytes, at a byte a second; bubbles as above.
    slow = replace(still, gpus_per_node=1, network_bandwidth=1.0, flops=1e30)
    sent = 8 * 2048 * 1024 * 2
    found = step_seconds(a, [ReferenceModel(a, 2)], layout, work, slow)
    assert found == pytest.approx(sent * (4 * (1 + 3 / 16) + (1 + 3 / 8)), rel=1e-3)


def test_small_micro_batches_take_longer() -> None:
    """Each reads and writes 4 bytes a parameter, at a byte a second, and under tensor parallelism
    waits for 8 collectives a layer, a second each."""
    a = Architecture(16, 1024, 2816, 8, 8, 128, 32000, 2048, **SHAPE)
    still = Cluster(2, flops=1e30, node_bandwidth=math.inf, memory_bandwidth=math.inf, latency=0.0)
    for micro_batch in (1, 4):
        work = Work(2048, micro_batch, 8, 32000)
        found = step_seconds(a, [], Layout(), work, replace(still, memory_bandwidth=1.0))
        assert found == pytest.approx(8 / micro_batch * 2 * 4 * parameters(a, 32000))
        found = step_seconds(a, [], Layout(tp=2), work, replace(still, latency=1.0))
        assert found == pytest.approx(8 / micro_batch * 8 * 16)


def test_experts_on_ranks() -> None:
    """64 ranks, TP2 and PP2: of 8 experts in each of 8 layers, 4 expert-parallel ranks have 2 each,
    with the other half of the layers on the other stage; 64 / (2 x 4) = 8 ranks have the same."""
    experts = Experts(8, 2, 1000, 0, True, (True,) * 8)
    a = Architecture(8, 512, 1344, 8, 8, 64, 32000, 512, experts=experts, **SHAPE)
    half = replace(a, layers=4, experts=replace(experts, layers=(True,) * 4))
    layout = Layout(tp=2, pp=2, dp=16, ep=4, sequence_parallel=True, distributed_optimizer=True)
    work = Work(512, 1, 64, 32000)
    mine = 4 * 2 * 3 * 512 * 1000
    router, norms, attention = 512 * 8, 2 * 512, 4 * 512 * 512
    others = 4 * (router + norms + attention // 2) + 32000 * 512 // 2
    found = memory(a, [ReferenceModel(half, 2)], layout, work, 0)
    assert found.policy == 2 * (mine + others)
    assert found.optimizer == 12 * mine // 8 + 12 * others // 16
    assert found.reference == 2 * (mine // 2 + others - 2 * (router + norms + attention // 2))
    # Split in two as well, an expert has half of its parameters on a rank, and 4 ranks the same.
    found = memory(a, [], replace(layout, etp=2), work, 0)
    assert found.policy == 2 * (mine // 2 + others)
    assert found.optimizer == 12 * mine // 2 // 4 + 12 * others // 16
    # A rank has 256 tokens, half of a sample, and sends 3/4 of their two copies elsewhere: forward,
    # backward, and the policy's scores forward once again.
    sent = 256 * 2 * 3 // 4 * (2 * 512 * 2 + 4)
    assert all_to_all_bytes(a, [], layout, work) == 4 * 4 * 2 * sent
    assert all_to_all_bytes(a, [half], layout, work) == 4 * (4 * 2 + 2) * sent
    still = Cluster(64, flops=1e30, node_bandwidth=1.0, memory_bandwidth=math.inf, latency=0.0)
    dense = replace(a, experts=None)
    of_pass = {
        model: step_seconds(model, [], replace(layout, dp=1, ep=2), work, still)
        for model in (a, dense)
    }
    # Two all-to-alls between two ranks take the place of two gathers and two scatters of the MLP.
    exchanged = 256 * 2 // 2 * (2 * 512 * 2 + 4) - 2 * 512 * 512 * 2 // 2
    found = of_pass[a] - of_pass[dense]
    assert found == pytest.approx(64 * 2 * 4 * exchanged * (1 + 1 / 64), rel=1e-6)


def test_a_block_of_layers_is_recomputed() -> None:
    """--recompute-method block: a quarter of the layers keep their input of 2 bytes a value, the
    others all; a quarter of the layers' forward pass runs again."""
    a = Architecture(16, 1024, 2816, 8, 8, 128, 32000, 2048, **SHAPE)
    work, layout = Work(2048, 1, 8, 32000), Layout(pp=2, vp=2)
    block = replace(work, recompute=1, recomputed=0.25)
    every = replace(work, recompute=1)
    (kept, on_top), (of_block, then), (of_every, last) = (
        activation_bytes(a, layout, one, 0) for one in (work, block, every)
    )
    flying = 2 + 2 + 1  # chunks of 4 layers
    layer = layer_activation_bytes(a, layout, work)
    assert kept - of_block == flying * (layer - 2 * 2048 * 1024)
    assert kept - of_every == 4 * (kept - of_block)
    assert then == on_top and last == on_top + layer
    none, some, most = (step_flops(a, [], one) for one in (work, block, every))
    assert some - none == pytest.approx((most - none) / 4)


def test_optimizer_states_in_several_groups() -> None:
    """--num-distributed-optimizer-instances: 16 ranks in 2 groups of 8, each with all states."""
    a = Architecture(4, 1024, 2816, 8, 8, 128, 32000, 2048, **SHAPE)
    layout = Layout(dp=16, distributed_optimizer=True, optimizer_instances=2)
    found = memory(a, [], layout, Work(2048, 1, 64, 32000), 0)
    assert found.optimizer == 12 * parameters(a, 32000) // 8
