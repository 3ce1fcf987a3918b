"""Read micro-batches in the form that the forward step takes: on this rank's device, cut for its
layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.selection import Choice

FIELDS = ("tokens", "position_ids", "labels", "loss_mask")


@dataclass
class MicroBatch:
    """One micro-batch of b samples on one rank.

    Its tensors are [b, s/c] for c context-parallel ranks, if not said otherwise.  A pipeline stage
    that does not need a tensor has None.
    """

    number: int
    """Position within the step, from 0."""
    tokens: Tensor | None = None
    """Token ids, int64; on the first pipeline stage."""
    position_ids: Tensor | None = None
    """Positions of the tokens, int64; on the first pipeline stage."""
    labels: Tensor | None = None
    """The tokens to predict, int64; on the last pipeline stage."""
    loss_mask: Tensor | None = None
    """1 where a token's loss counts and 0 elsewhere, float32; on the last pipeline stage."""
    domains: Tensor | None = None
    """The number in the blend of each sample's dataset, int64 [b]; on the last stage, in runs on a
    blend."""
    reference_losses: Tensor | None = None
    """Losses of the reference, float32, in nats; on the last stage, once they are known."""
    reference_entropies: Tensor | None = None
    """Entropies of the reference, float32, in nats; on the last stage, if the score needs them."""
    scores: Tensor | None = None
    """What tokens are ranked by, float32; on the last stage, once they have been ranked."""
    choice: Choice | None = None
    """The tokens chosen, if that was done before the policy's pass."""

    @property
    def valid(self) -> Tensor:
        """The tokens that may be selected, bool [b, s/c]; on the last pipeline stage."""
        assert self.loss_mask is not None
        return self.loss_mask > 0

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Return the arguments of GPTModel.forward; attention is causal and needs no mask."""
        return {
            "input_ids": self.tokens,
            "position_ids": self.position_ids,
            "attention_mask": None,
            "labels": self.labels,
        }


def read_micro_batches(
    data_iterator: Any,
    micro_batch_size: int,
    count: int,
    *,
    with_domains: bool = False,
    with_losses: bool = False,
) -> Iterator[MicroBatch]:
    """Read `count` micro-batches lazily; on a pipeline stage that needs no data, yield empty ones.

    Collective over the tensor-parallel ranks.

    Args:
        data_iterator: yields samples, collated; None but on the first tensor-parallel rank.
        micro_batch_size: samples of a micro-batch.
        count: micro-batches to read.
        with_domains: read the number of each sample's dataset, which samples of a blend carry.
        with_losses: read reference losses, which samples of a score cache carry.
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
        domains = losses = None
        sample: dict[str, Tensor] = {}
        if tp_rank == 0:
            sample = next(data_iterator)
            if args.sft:
                _check_one_conversation(sample)
            batch = {name: sample[name].cuda(non_blocking=True) for name in FIELDS}
        if with_domains and last:
            domains = _shared(sample.get("dataset_id"), (micro_batch_size,), torch.int64)
        if with_losses and last:
            shape = (micro_batch_size, args.seq_length)
            losses = _shared(sample.get("reference_losses"), shape, torch.float32)
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
            batch | {"reference_losses": losses},
            is_hybrid_cp=False,
            cp_group=mpu.get_context_parallel_group(),
        )
        yield MicroBatch(
            number,
            domains=domains,
            **{name: batch[name] for name in (*FIELDS, "reference_losses")},
        )


def whole_sequences(own: Tensor) -> Tensor:
    """Gather whole sequences, [n, s], from this rank's part of them, [n, s/c].

    Of a sequence's 2c chunks, context-parallel rank r of c holds the chunks r and 2c - 1 - r.
    Collective over the context-parallel ranks.
    """
    group = mpu.get_context_parallel_group()
    if group.size() == 1:
        return own
    of_ranks = [torch.empty_like(own) for _ in range(group.size())]
    torch.distributed.all_gather(of_ranks, own.contiguous(), group=group)
    halves = [part.chunk(2, dim=1) for part in of_ranks]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves[::-1]], dim=1)


def _shared(values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Broadcast the values of the first tensor-parallel rank to all of them."""
    group = mpu.get_tensor_model_parallel_group()
    result = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert values is not None, "the samples lack it"
        result.copy_(values, non_blocking=True)
    if group.size() > 1:
        torch.distributed.broadcast(result, group=group, group_src=0)
    return result


def _check_one_conversation(sample: dict[str, Tensor]) -> None:
    """Refuse samples with several conversations: attention would reach from one to the next.

    Also replaces the labels of prompts, -100, by a valid token, whose loss is masked.

    Raises:
        UserError: a sample has several conversations.
    """
    starts = sample["cu_seqlens"]  # [b, s + 1]: where conversations start, then s
    if (starts[:, 1:] < sample["tokens"].shape[1]).any():
        raise UserError(
            "--sft: a line of the data has several conversations (system messages start them), "
            "and packed sequences are not supported; write one conversation a line"
        )
    sample["labels"].clamp_(min=0)
