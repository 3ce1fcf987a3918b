"""Check that a reference can be cut as the policy is, before anything is built from it."""

from __future__ import annotations

from argparse import Namespace

from megatron_slm.errors import UserError
from megatron_slm.model.documents import has_plain_layers


def check_layout(own: Namespace, where: str) -> None:
    """Refuse a reference that the run's parallel sizes do not divide.

    Args:
        own: the reference's arguments.
        where: how errors name it.

    Raises:
        UserError: a size does not divide it.
    """
    of_expert = own.num_experts and (own.moe_ffn_hidden_size or own.ffn_hidden_size)
    of_shared = own.moe_shared_expert_intermediate_size
    tensor = own.tensor_model_parallel_size
    for what, value, name, size in (
        ("layers", own.num_layers, "pipeline-model", own.pipeline_model_parallel_size),
        ("attention heads", own.num_attention_heads, "tensor-model", tensor),
        ("feed-forward units", own.ffn_hidden_size, "tensor-model", tensor),
        ("experts", own.num_experts, "expert-model", own.expert_model_parallel_size),
        ("units in an expert", of_expert, "expert-tensor", own.expert_tensor_parallel_size),
        ("units in shared experts", of_shared, "tensor-model", tensor),
    ):
        if (value or 0) % size:
            raise UserError(
                f"{where} has {value} {what}, which the {name}-parallel size {size} does not "
                "divide; the reference runs on the policy's ranks, cut as the policy is: take "
                "another size, or another reference"
            )
    if not has_plain_layers(own):
        check_shared_heads(own, where)


def check_shared_heads(own: Namespace, where: str) -> None:
    """Refuse heads that Transformer Engine could not share out over context-parallel ranks.

    With --cp-comm-type a2a, each of these ranks computes whole heads; with a2a+p2p, each rank of a
    first-level group of them does.

    Args:
        own: the reference's arguments.
        where: how errors name it.

    Raises:
        UserError: the ranks do not divide a tensor-parallel rank's heads or query groups.
    """
    heads, tensor = own.num_attention_heads, own.tensor_model_parallel_size
    groups = own.num_query_groups if own.group_query_attention else heads
    for kind in own.cp_comm_type:
        if own.context_parallel_size == 1 or "a2a" not in kind:
            continue
        ranks = own.context_parallel_size
        if kind != "a2a":
            ranks = own.hierarchical_context_parallel_sizes[0]
        for what, number in (("attention heads", heads), ("query groups", groups)):
            on_rank = max(1, number // tensor)  # a rank has a whole query group at least
            if on_rank % ranks:
                raise UserError(
                    f"--cp-comm-type {kind}: {where} has {on_rank} {what} on a tensor-parallel "
                    f"rank, which {ranks} context-parallel ranks cannot share out: take p2p or "
                    "all_gather, or other parallel sizes"
                )
