"""Token dumps: what the policy makes of a few fixed samples, every so many iterations.

The samples are the first of the validation dataset, or of the training dataset where there is none,
divided among data-parallel ranks as a step's are.  They pass through the policy in a forward-only
pass of their own; the run's selector says which of their tokens it would train on, micro-batch by
micro-batch as in validation.  data/token_dump.py has the file.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_slm.data.scored_dataset import SampleScored
from megatron_slm.data.token_dump import TokenDump, write_dump
from megatron_slm.reference import Reference
from megatron_slm.reference.moving_average import MovingAverage
from megatron_slm.selection import TokenSelector
from megatron_slm.training.datasets import DatasetProvider
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches, whole_sequences
from megatron_slm.training.objective import MicroBatchObjective
from megatron_slm.training.policy_pass import Scored
from megatron_slm.training.settings import SelectiveSettings, Step

SAMPLES = 8


class TokenDumps:
    """The dumps of one run.

    Args:
        provider: has the run's datasets when the first step begins.
    """

    def __init__(
        self,
        directory: Path,
        interval: int,
        settings: SelectiveSettings,
        provider: DatasetProvider,
    ) -> None:
        self.directory, self.interval = directory, interval
        self.settings, self.provider = settings, provider
        self.last: int | None = None
        self.micro_batches: list[MicroBatch] | None = None

    def due(self, iteration: int, ends: bool) -> bool:
        """Whether it is time: when a run starts or `ends`, and at multiples of the interval."""
        wanted = ends or self.last is None or iteration % self.interval == 0
        return wanted and iteration != self.last

    def take(
        self,
        step: Step,
        selector: TokenSelector,
        reference: Reference | None,
        score: Callable[[list[MicroBatch]], list[Scored]],
    ) -> None:
        """Write a dump.  Collective over all ranks.

        Args:
            step: as if the samples were its micro-batches.
            reference: None where there is none to run.
            score: the policy's pass; losses and entropies where the last pipeline stage is.
        """
        self.last = step.iteration
        batches = self._scored_by(reference)
        scored = score(batches)
        if not mpu.is_pipeline_last_stage():
            return
        fields = []
        for batch, (losses, entropies) in zip(batches, scored, strict=True):
            objective = MicroBatchObjective(batch, self.settings, step, selector)
            objective.weigh(losses, entropies)
            choice = objective.choice
            selected = batch.valid if choice is None else choice.selected
            known = batch.reference_losses
            fields.append(
                torch.stack([losses, selected.float(), *([] if known is None else [known])])
            )
        whole = _of_all_ranks(torch.stack(fields, dim=1))[:, :SAMPLES].cpu().numpy()
        of_data_and_context = mpu.get_data_parallel_rank(with_context_parallel=True)
        if of_data_and_context == 0 and mpu.get_tensor_model_parallel_rank() == 0:
            self._write(step, whole)

    def _scored_by(self, reference: Reference | None) -> list[MicroBatch]:
        """This rank's micro-batches of the samples, with reference losses if there are any.  A
        reference that learns scores them anew each time."""
        size = get_args().micro_batch_size
        known = self.micro_batches is not None
        if self.micro_batches is None:
            count = _micro_batch_count()
            read = read_micro_batches(
                self._batches(size, count),
                size,
                count,
                with_domains=self._knows_domains(),
                with_losses=self.provider.caches is not None,
            )
            self.micro_batches = list(read)
        if reference is not None and (not known or isinstance(reference, MovingAverage)):
            count = len(self.micro_batches)
            self.micro_batches = list(reference.score(iter(self.micro_batches), count, size))
        return self.micro_batches

    def _knows_domains(self) -> bool:
        """Only a blend that is split has the training blend's datasets in validation as well."""
        split = get_blend_and_blend_per_split(get_args())[0] is not None
        return split and bool(self.settings.domains)

    def _batches(self, size: int, count: int) -> Iterator[dict[str, Any]] | None:
        """Of this data-parallel rank; None where no data is read."""
        found = self._dataset()
        if found is None:
            return None
        _, dataset, available = found
        rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        firsts = [(number * ranks + rank) * size for number in range(count)]
        return (
            torch.utils.data.default_collate(
                [dataset[at % available] for at in range(first, first + size)]
            )
            for first in firsts
        )

    def _dataset(self) -> tuple[str, Any, int] | None:
        """The split, its dataset, and how many samples that has."""
        train, valid, _ = self.provider.built
        if isinstance(valid, list):  # --multiple-validation-sets
            valid = valid[0]
        for split, dataset in (("valid", valid), ("train", train)):
            if dataset is not None:
                of_cache = isinstance(dataset, SampleScored)
                available = len(dataset.section if of_cache else dataset)
                if available > 0:
                    return split, dataset, available
        return None

    def _write(self, step: Step, fields: np.ndarray) -> None:
        """fields: losses, selected and, if there are any, reference losses, [2 or 3, n, s]."""
        found = self._dataset()
        assert found is not None
        split, dataset, available = found
        numbers = np.arange(fields.shape[1]) % available
        rows = [dataset[int(number)] for number in numbers]
        args, selection = get_args(), self.settings.selection
        model = args.tokenizer_model
        names = self.settings.domains if self._knows_domains() else ()
        about = {
            "tokenizer_type": args.tokenizer_type,
            # A name on the hub, or a path that reports find from wherever they are made.
            "tokenizer_model": str(Path(model).resolve())
            if model and Path(model).exists()
            else model,
            "split": split,
            "domains": [names[int(row["dataset_id"])] for row in rows] if names else None,
            "score": selection.score if self.settings.selective else None,
            "scope": selection.scope,
            "ratio": step.ratio,
        }
        ids = [np.append(row["tokens"][:1].numpy(), row["labels"].numpy()) for row in rows]
        dump = TokenDump(
            iteration=step.iteration,
            tokens=np.stack(ids).astype(np.int32),
            losses=fields[0],
            valid=np.stack([row["loss_mask"].numpy() > 0 for row in rows]),
            samples=numbers,
            about=about,
            reference_losses=fields[2] if len(fields) > 2 else None,
            selected=fields[1] > 0,
        )
        write_dump(self.directory, dump)


def token_dumps(
    args: Namespace, settings: SelectiveSettings, provider: DatasetProvider
) -> TokenDumps | None:
    """What the arguments ask for; None if nothing."""
    if args.slm_dump_interval is None:
        return None
    directory = Path(args.slm_dump_dir or Path(args.save) / "dump")
    return TokenDumps(directory, args.slm_dump_interval, settings, provider)


def _micro_batch_count() -> int:
    """Of each data-parallel rank: enough for the samples, and for the groups of virtual stages."""
    args = get_args()
    at_a_time = args.micro_batch_size * mpu.get_data_parallel_world_size()
    group = 1
    if args.virtual_pipeline_model_parallel_size is not None:
        stages = args.pipeline_model_parallel_size
        group = args.microbatch_group_size_per_vp_stage or stages
    return -(-SAMPLES // (at_a_time * group)) * group


def _of_all_ranks(fields: Tensor) -> Tensor:
    """[f, m, b, s/c] of this rank's m micro-batches as [f, n, s] in the order of samples: a
    micro-batch of each data-parallel rank before anyone's next."""
    whole = whole_sequences(fields.flatten(0, 2)).view(*fields.shape[:3], -1)
    group = mpu.get_data_parallel_group()
    of_ranks = [torch.empty_like(whole) for _ in range(group.size())]
    torch.distributed.all_gather(of_ranks, whole.contiguous(), group=group)
    return torch.stack(of_ranks, dim=2).flatten(1, 3)
