"""Write token dumps: the policy's losses of a few fixed samples, at regular intervals.

If a dump cannot be written, the run warns and goes on: dumps are only there to look at, and the
steps since the last checkpoint are worth more.

The policy scores the samples in a forward-only pass of its own, and the run's selector says which
of their tokens it would train on, micro-batch by micro-batch as in validation.  data/token_dump.py
defines the file, and fixed_samples.py reads the samples.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from megatron.core import mpu
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_slm.data.token_dump import TokenDump, write_dump
from megatron_slm.errors import UserError
from megatron_slm.files import make_directory
from megatron_slm.reference import Reference
from megatron_slm.selection import TokenSelector
from megatron_slm.training.datasets import DatasetProvider
from megatron_slm.training.fixed_samples import (
    FixedSamples,
    described_tokenizer,
    is_writer,
    of_all_ranks,
)
from megatron_slm.training.micro_batch import MicroBatch
from megatron_slm.training.objective import MicroBatchObjective
from megatron_slm.training.passes import with_reference
from megatron_slm.training.settings import SelectiveSettings, Step


class TokenDumps:
    """Writes the token dumps of a run."""

    def __init__(
        self,
        directory: Path,
        interval: int,
        settings: SelectiveSettings,
        provider: DatasetProvider,
    ) -> None:
        """Prepare for dumps.

        Args:
            directory: where dumps are written.
            interval: iterations between them.
            settings: the run's settings.
            provider: holds the run's datasets once the first step begins.
        """
        self.directory, self.interval = directory, interval
        self.settings, self.provider = settings, provider
        self.last: int | None = None
        self.micro_batches: list[MicroBatch] | None = None

    def due(self, iteration: int, ends: bool) -> bool:
        """Return whether it is time for a dump: when the run starts or `ends`, and at intervals."""
        wanted = ends or self.last is None or iteration % self.interval == 0
        return wanted and iteration != self.last

    def take(
        self,
        step: Step,
        selector: TokenSelector,
        reference: Reference | None,
        score: Callable[[list[MicroBatch]], list[dict[str, Tensor]]],
    ) -> None:
        """Write a dump.  Collective over all ranks.

        Args:
            step: a step that has the samples for its micro-batches.
            selector: says which tokens the run would train on.
            reference: scores the samples; None if no reference runs.
            score: scores micro-batches with the policy; on the last pipeline stage, returns what
                the run's score and weight read of it, by name.
        """
        self.last = step.iteration
        samples = FixedSamples(self.provider, get_args().slm_dump_train_samples)
        batches = self._scored_by(reference, samples)
        scored = score(batches)
        if not mpu.is_pipeline_last_stage():
            return
        fields = []
        for batch, said in zip(batches, scored, strict=True):
            objective = MicroBatchObjective(batch, self.settings, step, selector)
            objective.weigh(**said)
            choice = objective.choice
            selected = batch.valid if choice is None else choice.selected
            known = [] if batch.reference_losses is None else [batch.reference_losses]
            fields.append(torch.stack([said["losses"], selected.float(), *known]))
        whole = of_all_ranks(torch.stack(fields, dim=1))[:, : get_args().slm_dump_samples].cpu()
        if is_writer():
            self._write(step, samples, whole)

    def _scored_by(self, reference: Reference | None, samples: FixedSamples) -> list[MicroBatch]:
        """Return this rank's micro-batches, with reference losses if there are any.

        A frozen reference scores them once, any other one each time.
        """
        known = self.micro_batches is not None
        if self.micro_batches is None:
            self.micro_batches = samples.read(
                _micro_batch_count(),
                with_domains=self._knows_domains(),
                with_losses=self.provider.caches is not None,
                with_tokens="token_ids" in self.settings.selection.needs,
                with_external="external" in self.settings.selection.needs,
            )
        if reference is not None and not (known and reference.frozen):
            count, size = len(self.micro_batches), get_args().micro_batch_size
            with_reference(reference, iter(self.micro_batches), count, size)
        return self.micro_batches

    def _knows_domains(self) -> bool:
        """Return whether the samples know which dataset of the training blend they are from.

        In validation they do only if --split cuts the blend.
        """
        split = get_blend_and_blend_per_split(get_args())[0] is not None
        return (split or get_args().slm_dump_train_samples) and bool(self.settings.domains)

    def _write(self, step: Step, samples: FixedSamples, fields: Tensor) -> None:
        """Write a dump's file; warn if it cannot be written.

        Args:
            step: as for `take`.
            samples: the samples.
            fields: losses, selected tokens and, if there are any, reference losses, [2 or 3, n, s].
        """
        losses, selected, *reference = fields.numpy()
        tokens, valid = samples.tokens(len(losses))
        domains = None
        if self._knows_domains():
            domains = [self.settings.domains[number] for number in samples.domains(len(losses))]
        selection = self.settings.selection
        dump = TokenDump(
            iteration=step.iteration,
            tokens=tokens,
            losses=losses,
            valid=valid,
            samples=samples.numbers(len(losses)),
            about=msgspec.structs.replace(
                described_tokenizer(),
                split=samples.split,
                domains=domains,
                score=selection.score if self.settings.selective else None,
                scope=selection.scope,
                ratio=step.ratio,
            ),
            reference_losses=reference[0] if reference else None,
            selected=selected > 0,
            documents=samples.documents(len(losses)),
        )
        try:
            write_dump(self.directory, dump)
        except UserError as error:
            print(f"WARNING: {error}; training goes on without this token dump", flush=True)


def token_dumps(
    args: Namespace, settings: SelectiveSettings, provider: DatasetProvider
) -> TokenDumps | None:
    """Return what writes the token dumps that the arguments ask for; None if they ask for none.

    Raises:
        UserError: dumps cannot be written to their directory.
    """
    if args.slm_dump_interval is None:
        return None
    directory = Path(args.slm_dump_dir or Path(args.save) / "dump")
    make_directory(directory, "--slm-dump-dir")
    return TokenDumps(directory, args.slm_dump_interval, settings, provider)


def _micro_batch_count() -> int:
    """Return how many micro-batches of fixed samples each data-parallel rank reads.

    They are enough for all samples, and a multiple of what virtual pipeline stages need.
    """
    args = get_args()
    at_a_time = args.micro_batch_size * mpu.get_data_parallel_world_size()
    group = 1
    if args.virtual_pipeline_model_parallel_size is not None:
        stages = args.pipeline_model_parallel_size
        group = args.microbatch_group_size_per_vp_stage or stages
    return -(-args.slm_dump_samples // (at_a_time * group)) * group
