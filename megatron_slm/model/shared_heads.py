"""Check that --cp-comm-type can share out a model's attention heads over context-parallel ranks."""

from __future__ import annotations

from argparse import Namespace

from megatron_slm.errors import UserError


def check_shared_heads(args: Namespace, model: str) -> None:
    """Refuse heads that Transformer Engine could not share out, at the first step.

    With `a2a`, each context-parallel rank computes whole heads; with `a2a+p2p`, each rank of a
    first-level group of them does.

    Args:
        args: the model's arguments.
        model: how errors name it.

    Raises:
        UserError: the ranks do not divide a tensor-parallel rank's heads or query groups.
    """
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    groups = args.num_query_groups if args.group_query_attention else heads
    for kind in args.cp_comm_type:
        if args.context_parallel_size == 1 or "a2a" not in kind:
            continue
        ranks = args.context_parallel_size
        if kind != "a2a":
            ranks = args.hierarchical_context_parallel_sizes[0]
        for what, number in (("attention heads", heads), ("query groups", groups)):
            on_rank = max(1, number // tensor)  # a rank has a whole query group at least
            if on_rank % ranks:
                raise UserError(
                    f"--cp-comm-type {kind}: {model} has {on_rank} {what} on a tensor-parallel "
                    f"rank, which {ranks} context-parallel ranks cannot share out: take p2p or "
                    "all_gather, or other parallel sizes"
                )
