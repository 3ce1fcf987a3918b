"""Fill a score cache: score the samples that a training run will draw, or whole datasets.

    the first rank    writes the manifest and lists the shards that are still missing
    each replica      (data-parallel rank, of n) scores every n-th of these, one forward-only
                      pipeline pass a shard, without waiting for the other replicas
    its last stage    writes each shard, which gets its name only once it is on the disk

The content of a shard depends neither on the layout nor on the number of replicas, so a job that
was killed can continue in another layout.
"""

from __future__ import annotations

import os
import socket
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training import get_tokenizer
from megatron.training.training import get_train_valid_test_num_samples
from megatron.training.utils import print_rank_0
from torch import Tensor
from tqdm import tqdm

from megatron_slm.data.score_cache import missing_shards, write_shard
from megatron_slm.data.score_manifest import MANIFEST, CacheManifest, shard_size
from megatron_slm.data.scored_dataset import DocumentWindows, dataset_name
from megatron_slm.errors import UserError
from megatron_slm.jobs.job_arguments import settle_arguments
from megatron_slm.jobs.of_ranks import from_first_rank, of_any_rank
from megatron_slm.loss import Scoring
from megatron_slm.model.model_config import installed_layers
from megatron_slm.reference.checkpoint import (
    ReferenceCheckpoint,
    checkpoint_fingerprint,
    open_checkpoint,
)
from megatron_slm.reference.online import OnlineReference, frozen_reference
from megatron_slm.selective import open_for_scoring
from megatron_slm.training.caches import SPLITS, data_prefixes, describe_data
from megatron_slm.training.command_line.parsing import parse_job
from megatron_slm.training.command_line.refusals import in_one_line
from megatron_slm.training.datasets import DatasetProvider, reads_data
from megatron_slm.training.fixed_samples import whole_sequences
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches
from megatron_slm.training.passes import with_reference

OTHERS_POLL_SECONDS = 5.0
HIDDEN_SECONDS = 60.0  # NFS may hide a new file from other nodes for as long
FAILED = "megatron-slm: scoring failed"  # key of the job's store under which a rank says why


def parse_scoring_arguments(add_own: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """Parse the run's arguments and this job's own; arguments of training alone are ignored.

    Args:
        add_own: function that adds this project's arguments to the parser.

    Raises:
        UserError: an argument is wrong, or the run's samples are not known beforehand.
    """
    args = parse_job(add_own)
    if args.by == "sample":
        for name in ("full_validation", "multiple_validation_sets", "step_batch_size_schedule"):
            if getattr(args, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: which samples the run will draw is not known "
                    "beforehand; score --by document"
                )
    (load,) = args.slm_reference_load
    saved = open_checkpoint(load, args.slm_reference_ckpt_step).arguments
    settle_arguments(args, saved)
    if getattr(saved, "num_experts", None):
        _check_experts(args)
    if args.by == "sample" and args.train_iters is None:
        args.train_iters = args.train_samples // args.global_batch_size
    return args


def _check_experts(args: Namespace) -> None:
    replica = args.tensor_model_parallel_size * args.context_parallel_size
    if replica % (args.expert_tensor_parallel_size * args.expert_model_parallel_size):
        raise UserError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: the reference's "
            "experts would be shared out between replicas, which do not wait for each other while "
            "they score: take size 1, whatever size the run has"
        )


def score(args: Namespace) -> None:
    """Run the job.

    Raises:
        UserError: the input is wrong, which every rank finds alike; or a loss is NaN or infinite.
    """
    by_document = args.by == "document"
    ((checkpoint, own_arguments),) = open_for_scoring(
        args,
        args.slm_reference_load[0],
        [args.slm_reference_ckpt_step],
        draws=not by_document,
    )
    with in_one_line():
        datasets = _documents(args) if by_document else _samples()
    directory = Path(args.slm_reference_cache[0])
    manifest, missing = from_first_rank(lambda: _begin(args, checkpoint, directory, datasets))
    _check_shared(directory)
    replicas = mpu.get_data_parallel_world_size()
    mine = missing[mpu.get_data_parallel_rank() :: replicas]
    print_rank_0(
        f"> {sum(map(manifest.shards, manifest.sections)) - len(missing)} shards are there, "
        f"{len(missing)} to score on {replicas} replicas"
    )
    scoring = Scoring(args.slm_vocab_size, dense=args.slm_head == "dense")
    reference = frozen_reference(checkpoint, own_arguments, scoring, installed_layers())
    batches = _load(args, datasets, manifest, mine)
    first = torch.distributed.get_rank() == 0
    progress = tqdm(
        total=sum(len(manifest.records_of(*shard)) for shard in mine) * manifest.sequence_length,
        unit="token",
        unit_scale=True,
        disable=not first,
    )
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        for section, shard in mine:
            _score_shard(args, reference, batches, directory, manifest, section, shard, progress)
    except Exception as error:
        said = f"rank {args.rank} has ended by a {type(error).__name__}; see what it says"
        with suppress(RuntimeError):  # the first rank, which holds the store, may have ended
            store.set(FAILED, str(error) if isinstance(error, UserError) else said)
        raise
    progress.close()
    # Other replicas may take longer than a collective may wait.  The first rank stays, since it
    # holds the job's store.
    while first and missing_shards(directory, manifest):
        if store.check([FAILED]):
            raise UserError(store.get(FAILED).decode())
        time.sleep(OTHERS_POLL_SECONDS)
    print_rank_0(f"> {directory} is complete")


def _score_shard(
    args: Namespace,
    reference: OnlineReference,
    batches: Any,
    directory: Path,
    manifest: CacheManifest,
    section: str,
    shard: int,
    progress: tqdm[Any],
) -> None:
    records = len(manifest.records_of(section, shard))
    count = -(-records // args.micro_batch_size)
    read = read_micro_batches(batches, args.micro_batch_size, count, with_domains=True)
    shown = _shown(read, records, args.micro_batch_size, manifest.sequence_length, progress)
    scored = with_reference(reference, shown, count, args.micro_batch_size)
    if not mpu.is_pipeline_last_stage():
        return
    losses = _whole([batch.reference_losses for batch in scored], records)
    labels = _whole([batch.labels for batch in scored], records)
    if mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0:
        domains = torch.cat([batch.domains for batch in scored if batch.domains is not None])
        write_shard(
            directory,
            manifest,
            section,
            shard,
            losses.cpu().numpy(),
            labels.cpu().numpy().astype(np.int32),
            domains[:records].cpu().numpy(),
        )


def _shown(
    batches: Iterator[MicroBatch], records: int, size: int, length: int, progress: tqdm[Any]
) -> Iterator[MicroBatch]:
    """Yield micro-batches, and count their tokens in `progress`, without the last one's padding."""
    for first, batch in zip(range(0, records, size), batches, strict=True):
        progress.update(min(size, records - first) * length)
        yield batch


def _whole(parts: list[Tensor | None], records: int) -> Tensor:
    """Gather the first `records` rows of micro-batches, each [b, s/c], as [records, s]."""
    return whole_sequences(torch.cat([part for part in parts if part is not None])[:records])


def _begin(
    args: Namespace, checkpoint: ReferenceCheckpoint, directory: Path, datasets: dict[str, Any]
) -> tuple[CacheManifest, list[tuple[str, int]]]:
    """Write the manifest, and return it with the shards that remain to be scored."""
    sections = {name: size for name, (_, size) in datasets.items() if size > 0}
    if not sections:
        raise UserError("there is nothing to score: no samples, or no --data-path")
    what = {
        "kind": args.by,
        "dtype": args.cache_dtype,
        "sequence_length": args.seq_length,
        "shard_records": shard_size(sections, args.seq_length)
        if args.shard_samples is None
        else args.shard_samples,
        "sections": sections,
        "source": describe_data(args, args.by),
        "reference": checkpoint_fingerprint(checkpoint),
    }
    try:
        manifest = msgspec.convert(what, CacheManifest)
    except msgspec.ValidationError as error:
        raise UserError(
            f"no score cache can be made with these arguments: {error}; see --shard-samples"
        ) from error
    manifest.write(directory)
    return manifest, missing_shards(directory, manifest)


def _check_shared(directory: Path) -> None:
    """Check that all ranks see the manifest, which the first rank has written.  Collective.

    Raises:
        UserError: one does not, so that its shards would not be found.
    """
    deadline = time.monotonic() + HIDDEN_SECONDS
    while not (there := directory.is_dir() and MANIFEST in os.listdir(directory)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if node := of_any_rank(None if there else socket.gethostname()):
        raise UserError(
            f"--slm-reference-cache {directory}: {node} does not have what the first rank wrote "
            "there: name a directory that all nodes share"
        )


def _samples() -> dict[str, tuple[Any, int]]:
    """Return each split's dataset, and how many of its samples the run draws, on the first rank."""
    wanted = get_train_valid_test_num_samples()
    built = DatasetProvider()(list(wanted))
    return {
        split: (dataset, 0 if dataset is None else min(count, len(dataset)))
        for split, dataset, count in zip(SPLITS, built, wanted, strict=True)
    }


def _documents(args: Namespace) -> dict[str, tuple[Any, int]]:
    """Return all tokens of each dataset, as windows, and how many windows there are."""
    datasets = {}
    for prefix in data_prefixes(args):
        windows = None
        if reads_data():
            dataset = IndexedDataset(prefix, mmap=args.mmap_bin_files)
            windows = DocumentWindows(
                dataset,
                args.seq_length,
                int(get_tokenizer().eod),
                apart=args.dataloader_inter_document_masking,
            )
        datasets[dataset_name(prefix)] = (windows, 0 if windows is None else len(windows))
    return datasets


def _load(
    args: Namespace,
    datasets: dict[str, tuple[Any, int]],
    manifest: CacheManifest,
    shards: list[tuple[str, int]],
) -> Iterator[Any] | None:
    """Load the micro-batches of these shards, one after the other; None on ranks that read no data.

    The last micro-batch of a shard is padded with copies of its last sample.
    """
    if not reads_data():
        return None
    size = args.micro_batch_size

    def batches() -> Iterator[list[tuple[str, int]]]:
        for section, shard in shards:
            numbers = list(manifest.records_of(section, shard))
            numbers += numbers[-1:] * (-len(numbers) % size)
            for start in range(0, len(numbers), size):
                yield [(section, number) for number in numbers[start : start + size]]

    return iter(
        torch.utils.data.DataLoader(
            _Records({name: dataset for name, (dataset, _) in datasets.items()}),
            batch_sampler=batches(),
            num_workers=args.num_workers,
            pin_memory=True,
        )
    )


class _Records(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples by their section and number, each with its dataset's number in the blend."""

    def __init__(self, datasets: dict[str, Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, where: tuple[str, int]) -> dict[str, Any]:
        section, number = where
        return {"dataset_id": 0, **self.datasets[section][number]}
