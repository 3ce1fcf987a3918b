"""A reference that the run's parallel sizes do not divide is refused by name, before any step."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_slm.errors import UserError
from megatron_slm.reference.layout import check_layout, check_shared_heads

MODEL = {
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "group_query_attention": True,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 4,
    "hierarchical_context_parallel_sizes": None,
    "cp_comm_type": ["a2a"],
}
HIERARCHY = {
    "context_parallel_size": 8,
    "hierarchical_context_parallel_sizes": [2, 4],
    "cp_comm_type": ["a2a+p2p"],
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        HIERARCHY,
        {"context_parallel_size": 8, "cp_comm_type": ["p2p", "all_gather"]},
        {"context_parallel_size": 1, "tensor_model_parallel_size": 3},
    ],
)
def test_shared(changed: dict[str, object]) -> None:
    check_shared_heads(Namespace(**MODEL | changed), "the reference in DIR")


@pytest.mark.parametrize(
    ("changed", "kind", "what", "ranks"),
    [
        ({"context_parallel_size": 8}, "a2a", "12 attention heads", 8),
        ({"context_parallel_size": 6}, "a2a", "4 query groups", 6),
        ({"cp_comm_type": ["p2p", "a2a"], "num_query_groups": 2}, "a2a", "2 query groups", 4),
        ({"tensor_model_parallel_size": 2}, "a2a", "6 attention heads", 4),
        (HIERARCHY | {"tensor_model_parallel_size": 4}, "a2a+p2p", "3 attention heads", 2),
        (
            HIERARCHY | {"tensor_model_parallel_size": 2, "num_query_groups": 1},
            "a2a+p2p",
            "1 query groups",
            2,
        ),
    ],
)
def test_refused(changed: dict[str, object], kind: str, what: str, ranks: int) -> None:
    with pytest.raises(UserError) as refused:
        check_shared_heads(Namespace(**MODEL | changed), "the reference in DIR")
    assert str(refused.value).startswith(
        f"--cp-comm-type {kind}: the reference in DIR has {what} on a tensor-parallel rank, which "
        f"{ranks} context-parallel ranks cannot share out"
    )


EXPERTS = {
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": 32,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 2,
    "spec": None,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"num_experts": 3}, "3 experts, which the expert-model-parallel size 2"),
        (
            {"moe_ffn_hidden_size": 33},
            "33 units in an expert, which the expert-tensor-parallel size 2",
        ),
        ({"expert_tensor_parallel_size": 3}, "64 units in an expert, which the expert-tensor"),
        (
            {"moe_shared_expert_intermediate_size": 33, "tensor_model_parallel_size": 2},
            "33 units in shared experts, which the tensor-model-parallel size 2",
        ),
    ],
)
def test_experts(changed: dict[str, object], said: str | None) -> None:
    arguments = Namespace(**MODEL | EXPERTS | changed)
    if said is None:
        check_layout(arguments, "the reference in DIR")
        return
    with pytest.raises(UserError, match=f"the reference in DIR has {said}"):
        check_layout(arguments, "the reference in DIR")
