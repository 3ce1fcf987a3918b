"""Make up for what Megatron's --full-validation lacks with pipeline stages.

Megatron counts a set's iterations where the set is read, and fails on stages that read nothing.
With virtual stages, it also takes a stage's model chunks, each of which has an iterator of every
set, for the sets.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.training import get_args


def whole_sets(data_iterator: list[Any]) -> list[Any]:
    """Return the data iterator of each validation set, and set args.eval_iters for all of them.

    Collective over all ranks.

    Args:
        data_iterator: an iterator of each set; with virtual stages, a list of them for each chunk.
    """
    args = get_args()
    counts = torch.tensor(
        [count or 0 for count in args.eval_iters], device=torch.cuda.current_device()
    )
    torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
    args.eval_iters = counts.tolist()
    if args.virtual_pipeline_model_parallel_size is None:
        return data_iterator
    return [list(of_chunks) for of_chunks in zip(*data_iterator, strict=True)]
