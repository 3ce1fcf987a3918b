"""Say where the documents of packed samples lie, in the forms that layers take it in.

A packed sample holds several documents that do not see each other: attention is causal within each
of them, and positions begin anew.  Megatron's datasets say where documents end (`cu_seqlens`).
Transformer Engine's layers take the documents of all samples as one sequence (the format "thd");
the plain layers of layer_spec.py keep samples apart, and take documents of one length together.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.errors import UserError
from megatron_slm.selection import context_parallel_part


def packs_documents(args: Namespace) -> bool:
    """Return whether a run's samples are packed with documents that do not see each other."""
    return bool(args.sft or args.dataloader_inter_document_masking)


def has_plain_layers(args: Namespace) -> bool:
    """Return whether a model's layers are those of layer_spec.py.

    Args:
        args: the model's arguments.
    """
    return not HAVE_TE if args.spec is None else args.spec[-1] == "plain_block_spec"


def takes_one_sequence(args: Namespace) -> bool:
    """Return whether a model's layers take the packed documents of all samples as one sequence.

    Args:
        args: the model's arguments.
    """
    return packs_documents(args) and not has_plain_layers(args)


def activation_shape(args: Namespace, length: int, samples: int) -> dict[str, int]:
    """Return the arguments by which a schedule knows what pipeline stages send each other.

    Args:
        args: the model's arguments.
        length: tokens of a sample.
        samples: samples of a micro-batch.
    """
    if takes_one_sequence(args):
        length, samples = length * samples, 1
    return {"seq_length": length, "micro_batch_size": samples}


def by_sample(values: Tensor, length: int) -> Tensor:
    """Return values of tokens, [..., n, s/c] or, of samples that were passed as one sequence,
    [..., 1, n * s/c], as [..., n, s/c].

    Args:
        values: the values.
        length: tokens that this rank has of a sample, s/c.
    """
    return values.reshape(*values.shape[:-2], -1, length)


def document_bounds(cu_seqlens: Sequence[int], length: int, sample: str) -> list[int]:
    """Return 0 and the end of each document of a sample; documents without tokens are left out.

    Args:
        cu_seqlens: 0 and the end of each document, and then any number of times the sample's end.
        length: tokens of the sample.
        sample: what to call the sample in an error.

    Raises:
        UserError: these are not the bounds of documents that fill the sample.
    """
    rises = all(start <= stop for start, stop in pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or cu_seqlens[-1] != length or not rises:
        shown = ", ".join(map(str, cu_seqlens[:8])) + ", ..." * (len(cu_seqlens) > 8)
        raise UserError(
            f"{sample}: its cu_seqlens [{shown}] do not say where documents end: they must begin "
            f"at 0, never fall, and end at the sample's length, {length}"
        )
    return sorted(set(cu_seqlens))


@dataclass(frozen=True)
class Documents:
    """Where the documents of b samples of s tokens lie.  Not divided among any ranks."""

    bounds: list[list[int]]
    """Of each sample, 0 and the end of each of its documents; on the host."""
    numbers: Tensor
    """The number of each token's document within its sample, from 0, int64 [b, s]."""
    positions: Tensor
    """The position of each token within its document, from 0, int64 [b, s]."""

    @property
    def several(self) -> bool:
        """Whether any sample has more than one document."""
        return any(len(of_sample) > 2 for of_sample in self.bounds)

    @cached_property
    def lengths(self) -> list[int]:
        """The length of each document, sample by sample."""
        return [stop - start for ends in self.bounds for start, stop in pairwise(ends)]

    def ends(self) -> Tensor:
        """Return 0 and where each document ends in one row of all samples, int32, on the host."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """How many documents there are of each length, as (length, number), longest first.

        There are at most sqrt(2 b s) lengths, however many documents there are.
        """
        return sorted(Counter(self.lengths).items(), reverse=True)

    @cached_property
    def order(self) -> Tensor:
        """The tokens by the length of their document, longest first, and else as they come.

        They are places in the flattened samples, int64 [b * s].
        """
        tokens = torch.zeros_like(self.numbers)
        tokens.scatter_add_(1, self.numbers, torch.ones_like(self.numbers))
        return tokens.gather(1, self.numbers).flatten().argsort(descending=True, stable=True)

    @cached_property
    def places(self) -> Tensor:
        """The place of each token of the flattened samples in `order`, int64 [b * s]."""
        return torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(self.order.numel(), device=self.order.device)
        )


def documents_at(bounds: list[list[int]], cu_seqlens: Tensor, length: int) -> Documents:
    """Locate the documents of b samples.

    Args:
        bounds: of each sample, what document_bounds returned for it.
        cu_seqlens: the same, as the dataset has it, int32 [b, n], on the device.
        length: tokens of a sample, s.
    """
    begins = _begins(cu_seqlens, length)
    places = torch.arange(length, device=cu_seqlens.device)
    return Documents(bounds, begins.cumsum(1) - 1, places - (begins * places).cummax(1).values)


def document_numbers(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the number of each token's document within its sample, from 0, int64 [b, s].

    Args:
        cu_seqlens: 0 and the end of each document, and then the sample's end, int32 [b, n].
        length: tokens of a sample, s.
    """
    return _begins(cu_seqlens, length).cumsum(1) - 1


def _begins(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return 1 for the first token of each document and 0 for all others, int64 [b, s]."""
    begins = torch.zeros(len(cu_seqlens), length + 1, dtype=torch.int64, device=cu_seqlens.device)
    return begins.scatter_(1, cu_seqlens.long(), 1)[:, :length]


def joined(parts: Sequence[Documents]) -> Documents:
    """Join the documents of several micro-batches into those of one."""
    return Documents(
        [of_sample for part in parts for of_sample in part.bounds],
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


class SeparateDocuments:
    """Documents as the plain layers take them, with what the layers of one pass share."""

    qkv_format = None  # samples are kept apart, as far as Megatron's attention has to know

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self._masks: dict[int | None, Tensor] = {}
        self._rotary: Tensor | None = None

    def rotary(self, table: Tensor, group: ProcessGroup) -> Tensor:
        """Return the rotary angles of this rank's tokens, [s/c, b, 1, d], which begin anew in each
        document.

        Args:
            table: the angles of all positions, [s, 1, 1, d].
            group: the context-parallel ranks.
        """
        if self._rotary is None:
            own = context_parallel_part(self.documents.positions, group.rank(), group.size())
            self._rotary = table[:, 0][own.t()]
        return self._rotary

    def mask(self, left: int | None, dtype: torch.dtype, group: ProcessGroup) -> Tensor:
        """Return what is added to the scores of a rank's queries with all keys, [b, 1, s/c, s]: 0,
        or -inf at other documents, later positions, and those more than `left` before.

        Args:
            left: positions before its own that a token sees; None for all.
            dtype: the scores' type.
            group: the context-parallel ranks, whose keys come rank by rank.
        """
        if left not in self._masks:
            numbers, positions = self.documents.numbers, self.documents.positions
            length, device, size = numbers.shape[1], numbers.device, group.size()
            of_ranks = [zigzag(length, rank, size, device) for rank in range(size)]
            queries, keys = of_ranks[group.rank()], torch.cat(of_ranks)
            apart = positions[:, queries, None] - positions[:, None, keys]
            hidden = (numbers[:, queries, None] != numbers[:, None, keys]) | (apart < 0)
            if left is not None:
                hidden |= apart > left
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._masks[left] = mask.masked_fill_(hidden, -torch.inf)[:, None]
        return self._masks[left]


class PackedForPlainLayers(PackedSeqParams):
    """What GPTModel is given with the plain layers.

    To the model it is a packed sequence, for which it makes the rotary angles of a whole sample on
    every rank; the layers' attention gets `separate` instead.
    """

    def __init__(self, documents: Documents) -> None:
        length = documents.numbers.shape[1]
        super().__init__(qkv_format="thd", max_seqlen_q=length, max_seqlen_kv=length)
        self.separate = SeparateDocuments(documents)


def packed_as_one(documents: Documents) -> PackedSeqParams:
    """Return what GPTModel is given with Transformer Engine's layers, and with those of --spec:
    the documents of all samples as one sequence, [1, b * s]."""
    device = documents.numbers.device
    ends = documents.ends()
    if device.type == "cuda":  # a copy from pinned memory does not make the host wait
        ends = ends.pin_memory().to(device, non_blocking=True)
    longest = max(documents.lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=documents.numbers.shape[1],
    )


def zigzag(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Return the places in `length` tokens that a context-parallel rank holds, int64."""
    return context_parallel_part(torch.arange(length, device=device)[None], rank, size)[0]
