"""Memory and FLOPs by formula against runs: the kernel's account, torch's counter."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from jobs import write_dataset
from launch import pretrain
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.experts import Experts
from megatron_slm.model.hugging_face_config import from_hugging_face
from megatron_slm.planning.documents import document_length
from megatron_slm.planning.formulas import (
    all_to_all_bytes,
    chunks_in_flight,
    memory,
    step_flops,
)
from megatron_slm.planning.job import Layout, ReferenceModel, Work
from megatron_slm.planning.parameters import (
    active_parameters,
    parameters,
    stage_experts,
    stage_parameters,
)
from random_llama import write_random_llama

POLICY = Architecture(
    layers=8,
    hidden=256,
    ffn=704,
    heads=8,
    groups=4,
    head_dim=32,
    vocabulary=8191,
    positions=512,
    epsilon=1e-5,
    rope_theta=10000,
    rope_scaling=None,
    window=None,
    tied=False,
)
MODEL = """
    --num-layers 8 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 8
    --group-query-attention --num-query-groups 4 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 512 --max-position-embeddings 512
    --mock-data --tokenizer-type NullTokenizer --vocab-size 8191 --num-workers 0
    --micro-batch-size 2 --global-batch-size 8 --train-iters 2 --lr 1e-4 --eval-iters 0
    --eval-interval 1000
"""
WORK = Work(
    sequence=512,
    micro_batch=2,
    global_batch=8,
    padded_vocabulary=8192,
    weight_bytes=4,
    optimizer_bytes=8,
    kernels="plain",
    fused_gradients=False,
    device="cpu",
    head="dense",
)
REFERENCE = Architecture(**vars(POLICY) | {"layers": 4, "hidden": 128, "head_dim": 16, "ffn": 352})


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random reference with half the policy's depth and width."""
    return write_random_llama(tmp_path_factory.mktemp("reference"), REFERENCE, torch.float32)


EXPERTS = Experts(
    count=8, top_k=2, ffn=352, shared_ffn=192, normed=True, layers=(False, *[True] * 7)
)
WITH_EXPERTS = """
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 352 --moe-layer-freq [0,1,1,1,1,1,1,1]
    --moe-shared-expert-intermediate-size 192 --moe-shared-expert-gate --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall
"""
WHOLE = re.compile(r"norm|\.gate\.|shared_expert_gate")  # parameters that no rank has in part
RUNS = {
    "dp2, all tokens, like Qwen": (
        Layout(dp=2, distributed_optimizer=True),
        "--use-distributed-optimizer --add-qkv-bias --qk-layernorm",
        1,
    ),
    "tp2 sp, selected": (
        Layout(tp=2, sequence_parallel=True),
        "--tensor-model-parallel-size 2 --sequence-parallel",
        0.6,
    ),
    "dp2, through selected": (
        Layout(dp=2),
        "--slm-backward selected",
        0.5,
    ),
    "ep2, experts": (
        Layout(dp=2, ep=2, distributed_optimizer=True),
        f"--use-distributed-optimizer --expert-model-parallel-size 2 {WITH_EXPERTS}",
        0.6,
    ),
    "pp2 vpp2, recomputed": (
        Layout(pp=2, vp=2),
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        0.6,
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_memory_and_flops_of_a_run(case: str, reference: Path, tmp_path: Path) -> None:
    layout, flags, ratio = RUNS[case]
    like_qwen = "--qk-layernorm" in flags
    experts = EXPERTS if "--num-experts" in flags else None
    policy = replace(POLICY, qkv_bias=like_qwen, qk_norm=like_qwen, experts=experts)
    work, scored_by = WORK, []
    if ratio < 1:
        work = Work(**vars(WORK) | {"ratio": ratio, "head": "chunked"})
        scored_by = [REFERENCE]
        flags += f" --slm-token-ratio {ratio} --slm-reference-load {reference}"
    if "backward" in flags:
        work = replace(work, backward="selected")
    if "recompute" in flags:
        work = Work(**vars(work) | {"recompute": 1})
    arguments = [*MODEL.split(), *flags.split()]
    pretrain(2, arguments, tmp_path, module="measured_pretrain")
    measured = [json.loads((tmp_path / f"measured{rank}.json").read_text()) for rank in (0, 1)]
    for rank, found in enumerate(measured):
        stage = rank if layout.pp > 1 else 0
        expected = memory(
            policy, [ReferenceModel(one, 4) for one in scored_by], layout, work, stage
        )
        moment = expected.activations + expected.head
        assert found["states"] == pytest.approx(expected.total - moment, rel=1e-3)
        total = found["states"] + found["moment"]
        assert total == pytest.approx(expected.total, rel=0.05), (rank, found, expected)
    flops = step_flops(policy, scored_by, work, causal=False)
    # In blocks, selected tokens attend to what lies before them, and to little after.
    near = 0.06 if work.backward == "selected" else 1e-3
    assert sum(found["flops"] for found in measured) == pytest.approx(flops, rel=near)
    sent = layout.ranks * all_to_all_bytes(policy, scored_by, layout, work)
    assert sum(found["sent"] for found in measured) == pytest.approx(sent, rel=0.05)


def test_attention_within_documents(tmp_path: Path) -> None:
    """Token by token: each attends to those before it in its document and sample, and to itself."""
    draw = np.random.default_rng(2)
    texts = ["x" * int(length) for length in draw.exponential(60, 40)]
    write_dataset(tmp_path / "a", texts)
    write_dataset(tmp_path / "b", ["y" * 500])
    sample, pairs, tokens = 64, 0, 0
    for text in texts:
        place = 0
        for _ in range(len(text) + 1):  # and an end of document
            place = 1 if tokens % sample == 0 else place + 1
            pairs, tokens = pairs + 2 * place - 1, tokens + 1  # the full square, not its half
    data = {name: None for name in ("data_args_path", "per_split_data_args_path")}
    data |= {f"{split}_data_path": None for split in ("train", "valid", "test")}
    args = Namespace(seq_length=sample, dataloader_inter_document_masking=True, **data)
    args.data_path, args.mock_data = [str(tmp_path / "a")], False
    assert document_length(args) == pytest.approx(pairs / tokens)
    args.data_path = ["3", str(tmp_path / "a"), "1", str(tmp_path / "b")]
    of_b = (7 * 64**2 + 53**2) / 501
    assert document_length(args) == pytest.approx((3 * pairs / tokens + of_b) / 4)
    work = replace(WORK, document=pairs / tokens)
    least, most = (step_flops(POLICY, [REFERENCE], one) for one in (work, WORK))
    apart = work.global_batch * work.sequence * (work.sequence - pairs / tokens)
    widths = 7 / 2 * POLICY.layers * POLICY.heads * POLICY.head_dim
    widths += REFERENCE.layers * REFERENCE.heads * REFERENCE.head_dim
    assert most - least == pytest.approx(2 * apart * widths, rel=1e-2)
    args.data_path = [str(tmp_path / "absent")]
    assert document_length(args) is None


def test_parameters() -> None:
    """The published numbers of parameters, and stages that add up to them."""
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    published = {
        1_100_048_384: Architecture(22, 2048, 5632, 32, 4, 64, 32000, 2048, tied=False, **shape),
        7_241_732_096: Architecture(32, 4096, 14336, 32, 8, 128, 32000, 32768, tied=False, **shape),
        68_976_648_192: Architecture(80, 8192, 28672, 64, 8, 128, 32000, 4096, tied=False, **shape),
        1_235_814_400: Architecture(16, 2048, 8192, 32, 8, 64, 128256, 131072, tied=True, **shape),
        494_032_768: Architecture(  # Qwen2.5-0.5B
            24, 896, 4864, 14, 2, 64, 151936, 32768, tied=True, qkv_bias=True, **shape
        ),
        596_049_920: Architecture(  # Qwen3-0.6B
            28, 1024, 3072, 16, 8, 128, 151936, 32768, tied=True, qk_norm=True, **shape
        ),
    }
    for count, architecture in published.items():
        assert parameters(architecture, architecture.vocabulary) == count
        size = architecture.vocabulary
        stages = [stage_parameters(architecture, size, Layout(pp=2), s) for s in (0, 1)]
        again = architecture.vocabulary * architecture.hidden * architecture.tied
        assert sum(stages) == count + again


def test_parameters_of_experts() -> None:
    """As many as models of transformers have, and as published, in all and of those a token passes:
    Mixtral-8x7B, Qwen3-30B-A3B and Qwen1.5-MoE-A2.7B."""
    qwen3 = {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128}
    for config, published in (
        (MixtralConfig(), (46.7, 12.9)),
        (Qwen3MoeConfig(norm_topk_prob=True, **qwen3), (30.5, 3.3)),
        (Qwen2MoeConfig(), (14.3, 2.7)),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counted = {name: weight.numel() for name, weight in model.named_parameters()}
        total = sum(counted.values())
        of_experts = sum(number for name, number in counted.items() if ".experts." in name)
        a = from_hugging_face(config.to_dict(), "transformers")
        assert a.experts is not None
        active = total - of_experts * (a.experts.count - a.experts.top_k) // a.experts.count
        size = a.vocabulary
        assert (parameters(a, size), active_parameters(a, size)) == (total, active)
        assert (total / 1e9, active / 1e9) == pytest.approx(published, abs=0.06)
        # Two ranks split all but experts, of which four ranks of each stage have a quarter.
        layout = Layout(tp=2, pp=2, dp=2, ep=4)
        assert 4 * sum(stage_experts(a, layout, stage) for stage in (0, 1)) == of_experts
        of_ranks = sum(stage_parameters(a, size, layout, stage) for stage in (0, 1))
        whole = sum(number for name, number in counted.items() if WHOLE.search(name))
        split = total - of_experts - whole
        assert of_ranks == of_experts // 4 + split // 2 + whole


def test_chunks_in_flight() -> None:
    """Against Megatron's schedules, played through."""
    for pp, vp, micro_batches in ((4, 1, 8), (4, 1, 2), (4, 2, 8), (2, 4, 4)):
        layout = Layout(pp=pp, vp=vp)
        work = Work(**vars(WORK) | {"micro_batch": 1, "global_batch": micro_batches})
        for stage in range(pp):
            total = micro_batches * vp
            # As in forward_backward_pipelining_with_interleaving and without.
            warm_up = (pp - stage - 1) * 2 + (vp - 1) * pp if vp > 1 else pp - stage - 1
            held = most = min(warm_up, total)
            for _ in range(total - held):  # one forward, then one backward
                most = max(most, held + 1)
            assert chunks_in_flight(layout, work, stage) == most
