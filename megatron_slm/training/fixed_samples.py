"""A few samples that are scored again and again: the first of the validation dataset, or of the
training dataset where there is none or it is wanted, divided among data-parallel ranks as a step's
are."""

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

from megatron_slm.data.scored_dataset import SampleScored
from megatron_slm.training.datasets import DatasetProvider
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches, whole_sequences


class FixedSamples:
    """The samples of a run.  Where no data is read there is no dataset, and `available` is 0.

    Args:
        training: those of the training dataset, whatever else there is.

    split: "valid" or "train".  available: how many samples there are.
    """

    def __init__(self, provider: DatasetProvider, training: bool = False) -> None:
        train, valid, _ = provider.built
        if isinstance(valid, list):  # --multiple-validation-sets
            valid = valid[0]
        self.split, self.available = "", 0
        self.dataset: Any = None
        for split, dataset in (("train", train), ("valid", None if training else valid)):
            of_cache = isinstance(dataset, SampleScored)
            available = 0 if dataset is None else len(dataset.section if of_cache else dataset)
            if available > 0:
                self.split, self.dataset, self.available = split, dataset, available

    def read(self, count: int, **wanted: bool) -> list[MicroBatch]:
        """This rank's `count` micro-batches.  Collective over the tensor-parallel ranks.

        Args:
            wanted: with_domains, with_losses, as for read_micro_batches.
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
        """Which samples of the dataset the first `count` are: if there are fewer, some again."""
        return np.arange(count) % self.available

    def tokens(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Of the first `count`: ids, int32 [count, s + 1], and which have a loss that counts, bool
        [count, s]."""
        rows = [self.dataset[int(number)] for number in self.numbers(count)]
        ids = [np.append(row["tokens"][:1].numpy(), row["labels"].numpy()) for row in rows]
        valid = [row["loss_mask"].numpy() > 0 for row in rows]
        return np.stack(ids).astype(np.int32), np.stack(valid)

    def domains(self, count: int) -> list[int]:
        """The dataset in its blend of each of the first `count`."""
        return [int(self.dataset[int(number)]["dataset_id"]) for number in self.numbers(count)]


def of_all_ranks(fields: Tensor) -> Tensor:
    """[f, m, b, s/c] of this rank's m micro-batches as [f, n, s] in the order of samples: a
    micro-batch of each data-parallel rank before anyone's next.  Collective over the data- and
    context-parallel ranks."""
    whole = whole_sequences(fields.flatten(0, 2)).view(*fields.shape[:3], -1)
    group = mpu.get_data_parallel_group()
    of_ranks = [torch.empty_like(whole) for _ in range(group.size())]
    torch.distributed.all_gather(of_ranks, whole.contiguous(), group=group)
    return torch.stack(of_ranks, dim=2).flatten(1, 3)


def is_writer() -> bool:
    """Whether this rank, of those with the whole of the samples, is the one that writes."""
    return (
        mpu.is_pipeline_last_stage()
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
        and mpu.get_tensor_model_parallel_rank() == 0
    )


def described_tokenizer() -> dict[str, str | None]:
    """What readers of a dump find the tokenizer by."""
    args = get_args()
    model = args.tokenizer_model
    # A name on the hub, or a path that holds wherever a report is made.
    path = str(Path(model).resolve()) if model and Path(model).exists() else model
    return {"tokenizer_type": args.tokenizer_type, "tokenizer_model": path}
