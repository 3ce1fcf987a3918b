"""Score the same validation samples with every checkpoint of a run, in any layout.

Each checkpoint's losses become a token dump, DIR/losses/iter_*.safetensors; checkpoints whose dump
exists are not scored again.  The softmax excludes padding of the vocabulary, which depends on the
layout; the losses that a run logs include it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from megatron.core import mpu
from megatron.training.training import get_train_valid_test_num_samples
from megatron.training.utils import print_rank_0

from megatron_slm.data.manifest_types import DumpOrigin
from megatron_slm.data.token_dump import TokenDump, dump_path, read_dump, write_dump
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
from megatron_slm.reference.online import OnlineReference, frozen_reference, load_weights
from megatron_slm.selective import open_for_scoring
from megatron_slm.training.command_line.parsing import parse_job
from megatron_slm.training.datasets import DatasetProvider
from megatron_slm.training.fixed_samples import (
    FixedSamples,
    described_tokenizer,
    is_writer,
    of_all_ranks,
)
from megatron_slm.training.micro_batch import MicroBatch

# The number of validation samples depends on these; the checkpoint gives those left out.
NUMBERS = """
    global_batch_size eval_global_batch_size train_iters train_samples eval_interval
""".split()
CHECKPOINT_FLAGS = ("--load", "--ckpt-steps")
NUMBER = re.compile(r"[0-9]{1,18}")


def parse_dynamics_arguments(add_own: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """Parse the run's arguments and this job's own; arguments of training alone are ignored.

    Args:
        add_own: function that adds this project's arguments to the parser.

    Raises:
        UserError: an argument is wrong, or the directory has fewer than two checkpoints.
    """
    args = parse_job(add_own)
    if args.ckpt_steps is None:
        named = Path(args.load).glob("iter_*")
        args.ckpt_steps = [int(path.name[5:]) for path in named if NUMBER.fullmatch(path.name[5:])]
    args.ckpt_steps = sorted(set(args.ckpt_steps))
    if args.dynamics_tokens < 1:
        raise UserError("--dynamics-tokens must be at least 1")
    if len(args.ckpt_steps) < 2:
        raise UserError(f"--load {args.load}: dynamics need at least two checkpoints")
    saved = open_checkpoint(args.load, args.ckpt_steps[-1], CHECKPOINT_FLAGS).arguments
    settle_arguments(args, saved)
    for name in NUMBERS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(saved, name, None))
    # The run's options for its reference do not apply to its own checkpoints.
    args.slm_reference_offload = args.slm_reference_fp8 = False
    args.slm_reference_micro_batch_size = None
    return args


def score_checkpoints(args: Namespace) -> Path:
    """Run the job, and return the directory of the losses.

    Raises:
        UserError: the input is wrong, or losses cannot be written; raised on every rank.
    """
    opened = open_for_scoring(args, args.load, args.ckpt_steps, CHECKPOINT_FLAGS)
    provider = DatasetProvider()
    _, validation, _ = get_train_valid_test_num_samples()
    provider([1, validation, 0])
    samples = FixedSamples(provider)
    count = from_first_rank(
        lambda: min(samples.available, -(-args.dynamics_tokens // args.seq_length))
    )
    if count == 0:
        raise UserError("there are no samples to score: no --data-path, or an empty one")
    directory = Path(args.dynamics) / "losses"
    ranks = mpu.get_data_parallel_world_size()
    micro_batches = samples.read(-(-count // (args.micro_batch_size * ranks)))
    model: OnlineReference | None = None
    for step, (checkpoint, own) in zip(args.ckpt_steps, opened, strict=True):
        about = msgspec.structs.replace(
            described_tokenizer(),
            split=samples.split,
            checkpoint=checkpoint_fingerprint(checkpoint),
        )
        if _is_there(directory, step, checkpoint, samples, count):
            print_rank_0(f"> iteration {step}: scored before")
            continue
        if model is None:
            model = frozen_reference(
                checkpoint, own, Scoring(args.slm_vocab_size), installed_layers()
            )
        else:
            load_weights(model.model, checkpoint, own)
        failed = _score(args, model, micro_batches, samples, count, step, about, directory)
        if said := of_any_rank(failed):
            raise UserError(f"{said}; what was scored before is kept")
        print_rank_0(f"> iteration {step}: {count * args.seq_length:,} tokens scored")
    torch.distributed.barrier()
    return directory


def _is_there(
    directory: Path,
    step: int,
    checkpoint: ReferenceCheckpoint,
    samples: FixedSamples,
    count: int,
) -> bool:
    """Return whether this very checkpoint has already scored these very tokens."""

    def look() -> bool:
        path = dump_path(directory, step)
        if not path.exists():
            return False
        dump = read_dump(path)
        same = dump.about.checkpoint == checkpoint_fingerprint(checkpoint)
        return same and np.array_equal(dump.tokens, samples.tokens(count)[0])

    found: bool = from_first_rank(look)
    return found


def _score(
    args: Namespace,
    model: OnlineReference,
    micro_batches: list[MicroBatch],
    samples: FixedSamples,
    count: int,
    step: int,
    about: DumpOrigin,
    directory: Path,
) -> str | None:
    """Score with one checkpoint and write its losses.

    Returns:
        On the rank that writes, why the losses could not be written; None if they were, and on all
        other ranks.
    """
    scored = model.score(iter(micro_batches), len(micro_batches), args.micro_batch_size)
    if not mpu.is_pipeline_last_stage():
        return None
    own = torch.stack([losses for losses, _ in scored])
    whole = of_all_ranks(own[None])[0, :count].cpu().numpy()
    if is_writer():
        tokens, valid = samples.tokens(count)
        numbers = samples.numbers(count)
        try:
            documents = samples.documents(count)
            dump = TokenDump(step, tokens, whole, valid, numbers, about, documents=documents)
            write_dump(directory, dump)
        except UserError as error:
            return str(error)
    return None
