"""Read the few samples that a run scores again and again.

These are the first samples of the validation dataset or, if there is none or the user asks for it,
of the training dataset.  Data-parallel ranks share them as they share a step's samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import get_args
from numpy.typing import NDArray
from torch import Tensor

from megatron_slm.data.manifest_types import DumpOrigin
from megatron_slm.model.documents import document_numbers, packs_documents
from megatron_slm.training.datasets import DatasetProvider
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches


class FixedSamples:
    """The fixed samples of a run.

    On ranks that read no data there is no dataset, and no sample is available.
    """

    def __init__(self, provider: DatasetProvider, training: bool = False) -> None:
        """Choose the dataset.

        Args:
            provider: holds the datasets, which have been built.
            training: take the training dataset even if there is a validation dataset.
        """
        train, valid, _ = provider.built
        if isinstance(valid, list):  # --multiple-validation-sets
            valid = valid[0]
        self.split, self.available = "", 0
        self.dataset: Any = None
        self._read: list[dict[str, Any]] = []
        for split, dataset in (("train", train), ("valid", None if training else valid)):
            available = provider.available(split, dataset)
            if available > 0:
                self.split, self.dataset, self.available = split, dataset, available

    def read(self, count: int, **wanted: Any) -> list[MicroBatch]:
        """Read this rank's first `count` micro-batches.  Collective over the tensor-parallel ranks.

        Args:
            count: micro-batches to read.
            wanted: what of them to read, as for read_micro_batches.
        """
        size = get_args().micro_batch_size
        batches = None if self.dataset is None else self._batches(size, count)
        return list(read_micro_batches(batches, size, count, **wanted))

    def _batches(self, size: int, count: int) -> Iterator[dict[str, Any]]:
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        for number in range(count):
            first = (number * ranks + rank) * size
            rows = [self.dataset[at % self.available] for at in range(first, first + size)]
            yield torch.utils.data.default_collate(rows)

    def numbers(self, count: int) -> NDArray[np.int64]:
        """Return the numbers in the dataset of the first `count` samples; if there are not as many,
        they repeat."""
        return np.arange(count) % self.available

    def tokens(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids of the first `count` samples, int32 [count, s + 1], and which of
        their losses count, bool [count, s]."""
        rows = self._rows(count)
        # Labels of prompts are -100 in fine-tuning; the last label alone is not among the inputs.
        ids = [np.append(row["tokens"].numpy(), max(0, int(row["labels"][-1]))) for row in rows]
        valid = [row["loss_mask"].numpy() > 0 for row in rows]
        return np.stack(ids).astype(np.int32), np.stack(valid)

    def documents(self, count: int) -> NDArray[np.int32] | None:
        """Return the number within its sample of the document that each token of the first `count`
        samples is in, int32 [count, s]; None in runs in which documents see each other."""
        if not packs_documents(get_args()):
            return None
        ends = torch.stack([row["cu_seqlens"] for row in self._rows(count)])
        numbers: NDArray[np.int64] = document_numbers(ends, get_args().seq_length).numpy()
        return numbers.astype(np.int32)

    def domains(self, count: int) -> list[int]:
        """Return the number in the blend of the dataset that each of the first `count` samples is
        from."""
        return [int(row["dataset_id"]) for row in self._rows(count)]

    def _rows(self, count: int) -> list[dict[str, Any]]:
        """Return the first `count` samples.  They are read once: they are always the same."""
        if len(self._read) != count:
            self._read = [self.dataset[int(number)] for number in self.numbers(count)]
        return self._read


def of_all_ranks(fields: Tensor) -> Tensor:
    """Gather fields of every rank's micro-batches, in the order of the samples.

    That order takes a micro-batch of each data-parallel rank before the next of any.  Collective
    over the data- and context-parallel ranks.

    Args:
        fields: f fields of this rank's m micro-batches, [f, m, b, s/c].

    Returns:
        The fields of all n samples, whole sequences, [f, n, s].
    """
    whole = whole_sequences(fields.flatten(0, 2)).view(*fields.shape[:3], -1)
    group = mpu.get_data_parallel_group()
    of_ranks = [torch.empty_like(whole) for _ in range(group.size())]
    torch.distributed.all_gather(of_ranks, whole.contiguous(), group=group)
    return torch.stack(of_ranks, dim=2).flatten(1, 3)


def is_writer() -> bool:
    """Return whether this rank writes, of the ranks that hold the gathered fields."""
    return (
        mpu.is_pipeline_last_stage()
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        and mpu.get_tensor_model_parallel_rank() == 0
    )


def described_tokenizer() -> DumpOrigin:
    """Return what a dump says of the tokenizer, so that its readers find it."""
    args = get_args()
    model = args.tokenizer_model
    # A name on the hub stays as it is; a path must hold wherever a report is made.
    path = str(Path(model).resolve()) if model and Path(model).exists() else model
    return DumpOrigin(args.tokenizer_type, path)


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
