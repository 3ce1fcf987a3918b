"""Find the rows of hidden states that a micro-batch's backward pass needs, and gather them.

A row is a token of a micro-batch, in the order of hidden states, [s/c * b].  The rows that count
are those with a gradient: the head gives none to tokens that are not selected, and neither do the
layers of selected_layers.py.  So each pipeline stage sees them in the gradient that it is sent.

Rows are gathered as a short sequence of one sample, [k, 1, h].  With sequence parallelism, each of
t ranks has its part of it, [k/t, 1, h], as layers expect; only rows that count travel.  Rows of
zeros fill it up to a multiple of t, and to one row where no token counts, since all ranks have to
take part in what layers communicate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.model.documents import SeparateDocuments, zigzag

# Queries that attend together: the fewer, the less of the masked half of attention is computed.
QUERIES = 256


@dataclass(frozen=True)
class Sharing:
    """The ranks that share a micro-batch's tokens."""

    tp: ProcessGroup
    """The tensor-parallel ranks."""
    cp: ProcessGroup
    """The context-parallel ranks."""
    sequence_parallel: bool
    """Whether hidden states are split over the tensor-parallel ranks."""

    @property
    def parts(self) -> int:
        """Number of ranks over which this rank's part of a sequence is split."""
        return self.tp.size() if self.sequence_parallel else 1


@dataclass(frozen=True)
class Queries:
    """Rows of one sample that attend together."""

    first: int
    """The first key that any of them sees."""
    last: int
    """One more than the last."""
    mask: Tensor
    """What is added to their scores with these keys, [queries, last - first]: 0, or -inf."""


class SelectedRows:
    """The rows of one micro-batch that count, on one rank, sample by sample."""

    def __init__(
        self, gradient: Tensor, sharing: Sharing, documents: SeparateDocuments | None
    ) -> None:
        """Find the rows.  Collective over the tensor-parallel ranks; the host waits for the device.

        Args:
            gradient: of a layer's output, [s/c, b, h], or [s/c/t, b, h] with sequence parallelism.
            sharing: the ranks that share the tokens.
            documents: the documents of packed samples.
        """
        self.sharing = sharing
        self.documents = documents
        length, self.samples, _ = gradient.shape
        self.length = length * sharing.parts
        counted = (gradient != 0).any(-1).to(torch.uint8)
        if sharing.sequence_parallel:
            counted = gather_from_sequence_parallel_region(counted, group=sharing.tp)
        elif sharing.tp.size() > 1:
            torch.distributed.all_reduce(counted, torch.distributed.ReduceOp.MAX, group=sharing.tp)
        host = counted.cpu()
        self.counts: list[int] = host.sum(0, dtype=torch.int64).tolist()
        samples, places = host.t().nonzero(as_tuple=True)
        rows = places * self.samples + samples
        if sharing.sequence_parallel:
            here = length * self.samples
            mine = rows // here == sharing.tp.rank()
            self._own = (rows[mine] - here * sharing.tp.rank()).to(gradient.device)
            self._places = mine.nonzero().squeeze(1).to(gradient.device)
        self.count = len(rows)
        self.size = max(1, -(-self.count // sharing.parts)) * sharing.parts
        filled = torch.nn.functional.pad(rows, (0, self.size - self.count))
        self.filled = filled.to(gradient.device)
        """The rows, then row 0 in the place of zeros, int64 [k]."""
        self.rows = self.filled[: self.count]
        """The rows, int64."""
        self._queries: dict[tuple[int | None, torch.dtype], list[list[Queries]]] = {}
        self._rotary: Tensor | None = None

    def take(self, values: Tensor) -> Tensor:
        """Gather the rows of hidden states or of their gradient, [k/t, 1, h]."""
        taken = values.new_zeros(self.size, values.shape[-1])
        flat = values.flatten(0, 1)
        if not self.sharing.sequence_parallel:
            taken[: self.count] = flat.index_select(0, self.rows)
            return taken[:, None]
        taken.index_copy_(0, self._places, flat.index_select(0, self._own))
        part: Tensor = reduce_scatter_to_sequence_parallel_region(taken, group=self.sharing.tp)
        return part[:, None]

    def put(self, taken: Tensor, like: Tensor) -> Tensor:
        """Put gathered rows, [k/t, 1, h], back into zeros of the shape of `like`."""
        whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
        flat, taken = whole.view(-1, whole.shape[-1]), taken[:, 0]
        if not self.sharing.sequence_parallel:
            flat.index_copy_(0, self.rows, taken[: self.count])
            return whole
        taken = gather_from_sequence_parallel_region(taken, group=self.sharing.tp)
        flat.index_copy_(0, self._own, taken.index_select(0, self._places))
        return whole

    def rotary(self, table: Tensor) -> Tensor:
        """Return the rotary angles of the rows, [k, 1, 1, d].

        Args:
            table: those of this rank's tokens, [s/c, 1, 1, d]; of packed samples, those of all
                positions, [s, 1, 1, d].
        """
        if self._rotary is None:
            if self.documents is None:
                self._rotary = table.index_select(0, self.filled // self.samples)
            else:
                angles = self.documents.rotary(table, self.sharing.cp)
                self._rotary = angles.flatten(0, 1).index_select(0, self.filled)[:, None]
        return self._rotary

    def queries(self, left: int | None, dtype: torch.dtype) -> list[list[Queries]]:
        """Return the rows of each sample as attention takes them, in order.

        Args:
            left: positions before its own that a token sees; None for all.
            dtype: the scores' type.
        """
        if (left, dtype) not in self._queries:
            self._queries[left, dtype] = self._build_queries(left, dtype)
        return self._queries[left, dtype]

    def _build_queries(self, left: int | None, dtype: torch.dtype) -> list[list[Queries]]:
        size, device = self.sharing.cp.size(), self.rows.device
        whole = self.length * size
        of_ranks = [zigzag(whole, rank, size, device) for rank in range(size)]
        own, keys = of_ranks[self.sharing.cp.rank()], torch.cat(of_ranks)
        positions = own[self.rows // self.samples].split(self.counts)
        hidden = []
        for sample, of_sample in enumerate(positions):
            for queries in of_sample.split(QUERIES) if len(of_sample) else ():
                apart = queries[:, None] - keys
                unseen = apart < 0
                if left is not None:
                    unseen |= apart > left
                if self.documents is not None:
                    numbers = self.documents.documents.numbers[sample]
                    unseen |= numbers[queries][:, None] != numbers[keys]
                hidden.append((sample, unseen))
        built: list[list[Queries]] = [[] for _ in positions]
        if not hidden:
            return built
        seen = torch.stack([~unseen.all(0) for _, unseen in hidden]).to(torch.uint8)
        bounds = torch.stack([seen.argmax(1), whole - seen.flip(1).argmax(1)], 1).tolist()
        for (sample, unseen), (first, last) in zip(hidden, bounds, strict=True):
            mask = torch.zeros(len(unseen), last - first, dtype=dtype, device=device)
            mask.masked_fill_(unseen[:, first:last], -torch.inf)
            built[sample].append(Queries(first, last, mask))
        return built
