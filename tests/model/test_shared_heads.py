"""Heads that context-parallel ranks cannot share out are refused by name, before any step."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_slm.errors import UserError
from megatron_slm.model.shared_heads import check_shared_heads

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
