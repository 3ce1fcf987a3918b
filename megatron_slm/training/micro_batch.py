"""Micro-batches as the forward step takes them: on this rank's device, cut for its layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

FIELDS = ("tokens", "position_ids", "labels", "loss_mask")


@dataclass
class MicroBatch:
    """One micro-batch of b samples on one rank: tensors [b, s/c] for c context-parallel ranks.

    tokens, position_ids: int64, on the first pipeline stage, None elsewhere.
    labels: int64 and loss_mask: float32, on the last pipeline stage, None elsewhere.
    reference_losses: float32 in nats, on the last stage where there is a reference.
    number: position within the step, from 0.
    """

    number: int
    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    reference_losses: Tensor | None = None


def read_micro_batches(
    data_iterator: Any, micro_batch_size: int, count: int
) -> Iterator[MicroBatch]:
    """Read `count` micro-batches lazily; empty ones on a pipeline stage that needs no data.

    Collective over the tensor-parallel ranks, of which only the first has a data iterator.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage()
    last = mpu.is_pipeline_last_stage()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    for number in range(count):
        if not (first or last):
            yield MicroBatch(number)
            continue
        batch: dict[str, Any] = {}
        if tp_rank == 0:
            sample = next(data_iterator)
            batch = {name: sample[name].cuda(non_blocking=True) for name in FIELDS}
        batch = get_batch_on_this_tp_rank(
            batch,
            has_cu_seqlens=False,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=False,
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            cp_size=args.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=first,
            is_pipeline_last_stage=last,
        )
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
        yield MicroBatch(number, **{name: batch[name] for name in FIELDS})


def model_inputs(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
    """Arguments of GPTModel.forward.  No attention mask: attention is causal."""
    return {
        "input_ids": micro_batch.tokens,
        "position_ids": micro_batch.position_ids,
        "attention_mask": None,
        "labels": micro_batch.labels,
    }
