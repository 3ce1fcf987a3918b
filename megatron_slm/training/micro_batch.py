"""Read micro-batches in the form that the forward step takes: on this rank's device, cut for its
layout.

A sample may be packed with several documents that do not see each other (model/documents.py).  Its
tensors are the same either way; only the arguments of the model differ.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.training import stimer, update_seqlen_stats_from_cu_seqlens
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.model.documents import (
    Documents,
    PackedForPlainLayers,
    document_bounds,
    documents_at,
    joined,
    packed_as_one,
    packs_documents,
    takes_one_sequence,
)
from megatron_slm.selection import Choice, Tokens, context_parallel_part
from megatron_slm.training.left_out import LeftOut
from megatron_slm.training.sample_fields import FIELDS, check_fields, check_read


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
    left_out: Tensor | None = None
    """Tokens that the run leaves out of the loss mask, bool; on the last pipeline stage, in runs
    that leave out any."""
    token_ids: Tensor | None = None
    """Token ids, int64; on the last pipeline stage, if a score or a weight reads them."""
    external: Tensor | None = None
    """Outside values of the labels, float32; on the last pipeline stage, if a score or a weight
    reads them."""
    packed: Documents | None = None
    """Where the documents of whole samples lie, not cut for the layout; on every pipeline stage, in
    runs whose samples are packed with documents that do not see each other."""
    domains: Tensor | None = None
    """The number in the blend of each sample's dataset, int64 [b]; on the last stage, in runs on a
    blend."""
    reference_losses: Tensor | None = None
    """Losses of the reference, float32, in nats; on the last stage, once they are known."""
    reference_entropies: Tensor | None = None
    """Entropies of the reference, float32, in nats; on the last stage, if the score needs them."""
    scores: Tensor | None = None
    """What tokens are ranked by, float32; on the last stage, once they have been ranked."""
    scored: Tokens | None = None
    """What the score and the weight have read; on the last stage, once they have been ranked."""
    choice: Choice | None = None
    """The tokens chosen, if that was done before the policy's pass."""

    @property
    def valid(self) -> Tensor:
        """The tokens that may be selected, bool [b, s/c]; on the last pipeline stage."""
        assert self.loss_mask is not None
        return self.loss_mask > 0

    @property
    def documents(self) -> Tensor | None:
        """The number of each token's document within its sample, from 0, int64 [b, s/c].

        None in runs in which documents see each other.  A label belongs to the document of the
        token that it is predicted from.
        """
        return None if self.packed is None else own_part(self.packed.numbers)

    @property
    def document_positions(self) -> Tensor | None:
        """The position of each token within its document, from 0, int64 [b, s/c]; None as above."""
        return None if self.packed is None else own_part(self.packed.positions)

    def model_inputs(self, args: Namespace, *others: MicroBatch) -> dict[str, Any]:
        """Return the arguments of GPTModel.forward for this micro-batch, and others joined to it.

        Attention is causal and needs no mask.  If the model takes packed documents as one sequence,
        its losses have the shape [1, b * s/c].

        Args:
            args: the model's arguments.
            others: the other micro-batches.
        """
        batches = (self, *others)
        inputs = {
            "input_ids": _joined([batch.tokens for batch in batches]),
            "position_ids": _joined([batch.position_ids for batch in batches]),
            "attention_mask": None,
            "labels": _joined([batch.labels for batch in batches]),
        }
        if args.mtp_num_layers:  # the reference has none
            inputs["loss_mask"] = self.loss_mask
        parts = [batch.packed for batch in batches if batch.packed is not None]
        if not parts:
            return inputs
        documents = parts[0] if len(parts) == 1 else joined(parts)
        if not takes_one_sequence(args):
            return inputs | {"packed_seq_params": PackedForPlainLayers(documents)}
        pipelined = mpu.get_pipeline_model_parallel_world_size() > 1
        if not documents.several and not (pipelined and len(documents.bounds) > 1):
            return inputs  # as in a run without packing, to the bit
        flat = {
            name: None if value is None else value.reshape(1, -1) for name, value in inputs.items()
        }
        return flat | {"packed_seq_params": packed_as_one(documents)}


def read_micro_batches(
    data_iterator: Any,
    micro_batch_size: int,
    count: int,
    *,
    with_domains: bool = False,
    with_losses: bool = False,
    with_tokens: bool = False,
    with_external: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[MicroBatch]:
    """Read `count` micro-batches lazily; on a pipeline stage that needs no data, yield empty ones.

    Collective over the tensor-parallel ranks.

    Args:
        data_iterator: yields samples, collated; None but on the first tensor-parallel rank.
        micro_batch_size: samples of a micro-batch.
        count: micro-batches to read.
        with_domains: read the number of each sample's dataset, which samples of a blend carry.
        with_losses: read reference losses, which samples of a score cache carry.
        with_tokens: read token_ids.
        with_external: read external values, which samples of --slm-token-values carry.
        left_out: which tokens to leave out of the loss mask.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage()
    last = mpu.is_pipeline_last_stage()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    packs = packs_documents(args)
    for number in range(count):
        if not (first or last or packs):
            yield MicroBatch(number)
            continue
        batch: dict[str, Any] = {}
        domains = losses = packed = None
        shape = (micro_batch_size, args.seq_length)
        sample: dict[str, Tensor] = {}
        if tp_rank == 0:
            check_read(data_iterator)
            stimer(bdata=True).start()  # for --log-straggler, as in step.py
            sample = next(data_iterator)
            stimer.stop()
            check_fields(sample, args.seq_length, packs=packs, of_a_blend=with_domains and last)
        if packs:
            packed = _documents(sample, micro_batch_size, number)
        if not (first or last):
            yield MicroBatch(number, packed=packed)
            continue
        if tp_rank == 0:
            sample["labels"].clamp_(min=0)  # those of prompts are -100, and masked
            batch = {
                name: sample[name].cuda(non_blocking=True).to(dtype)
                for name, dtype in FIELDS.items()
            }
            if left_out and last:
                places = None if packed is None else packed.positions
                kept = left_out.applied(batch, sample, places)
                # -1 until the mask is where it is needed, so that it is known which were left out.
                batch["loss_mask"] = torch.where(batch["loss_mask"] > kept, -1.0, kept)
        if with_domains and last:
            domains = _shared(sample.get("dataset_id"), (micro_batch_size,), torch.int64)
        if with_losses and last:
            losses = _shared(sample.get("reference_losses"), shape, torch.float32)
        tokens = external = None
        if with_tokens and last:
            tokens = _shared(sample.get("tokens"), shape, torch.int64)
        if with_external and last:
            external = _shared(sample.get("external"), shape, torch.float32)
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
            mtp_on_this_rank=bool(args.mtp_num_layers) and last,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=first,
            is_pipeline_last_stage=last,
        )
        batch = get_batch_on_this_cp_rank(
            batch | {"reference_losses": losses, "token_ids": tokens, "external": external},
            is_hybrid_cp=False,
            cp_group=mpu.get_context_parallel_group(),
        )
        out = _taken_out(batch) if left_out and last else None
        yield MicroBatch(
            number,
            packed=packed,
            domains=domains,
            left_out=out,
            **{
                name: batch[name] for name in (*FIELDS, "reference_losses", "token_ids", "external")
            },
        )


def tell_lengths(micro_batch: MicroBatch) -> MicroBatch:
    """Tell Megatron how long a micro-batch's documents are, for the FLOPs that it logs."""
    if micro_batch.packed is not None:
        ends = micro_batch.packed.ends().pin_memory()
        # Megatron would wait for a copy to the device.
        update_seqlen_stats_from_cu_seqlens(ends.cuda(non_blocking=True))
    return micro_batch


def _shared(values: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Broadcast the values of the first tensor-parallel rank to all of them."""
    group = mpu.get_tensor_model_parallel_group()
    # --full-validation reads one sample at a time, whatever the size.
    shape = shape if values is None else values.shape
    result = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert values is not None, "the samples lack it"
        result.copy_(values, non_blocking=True)
    if group.size() > 1:
        torch.distributed.broadcast(result, group=group, group_src=0)
    return result


def _documents(sample: dict[str, Tensor], micro_batch_size: int, number: int) -> Documents:
    """Locate the documents of a micro-batch.  Collective over the tensor-parallel ranks.

    The host has to know the lengths of documents.  The loader left them in its memory; other
    tensor-parallel ranks wait for the device, as Megatron's own broadcast of them does.

    Args:
        sample: what the loader yielded; empty but on the first tensor-parallel rank.
        micro_batch_size: samples of the micro-batch.
        number: number of the micro-batch.

    Raises:
        UserError: the samples say wrongly where documents are, or the layers cannot take them in
            this layout.
    """
    args = get_args()
    length = args.seq_length
    # --full-validation reads one sample at a time, whatever the size.
    samples = len(sample["cu_seqlens"]) if sample else micro_batch_size
    ends = _shared(sample.get("cu_seqlens"), (samples, length + 1), torch.int32)
    rows: list[list[int]] = sample.get("cu_seqlens", ends).tolist()
    bounds = [
        document_bounds(row, length, f"sample {place} of micro-batch {number}")
        for place, row in enumerate(rows)
    ]
    documents = documents_at(bounds, ends, length)
    if args.context_parallel_size > 1 and takes_one_sequence(args) and documents.several:
        raise UserError(
            "--context-parallel-size: a sample has several documents, which Transformer Engine's "
            "attention wants cut over the ranks document by document, while selection goes by "
            "whole samples: leave it out, or put one conversation on each line of the data"
        )
    return documents


def _taken_out(batch: dict[str, Any]) -> Tensor:
    """Return the tokens whose loss mask is negative, bool [b, s/c], and make it 0 there."""
    out: Tensor = batch["loss_mask"] < 0
    batch["loss_mask"] = batch["loss_mask"].clamp(min=0.0)
    return out


def own_part(whole: Tensor) -> Tensor:
    """Return this context-parallel rank's part, [b, s/c], of values of whole samples, [b, s]."""
    rank, size = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    return context_parallel_part(whole, rank, size)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Join what several micro-batches have of one kind; None if this stage does not have it."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    return torch.cat(known)
