"""Check that the parts into which Megatron cuts datasets hold what a run draws from them.

--split cuts the documents of each dataset into a training, a validation and a test part.  Megatron
builds all three, even those that a run draws nothing from, and passes through a part as often as
its samples need: if the part has no tokens, it does so for ever, silently, on all ranks.  A dataset
of a blend without weights, and one of --full-validation, is read once and must hold a whole sample.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_slm.data.indexed_format import Index
from megatron_slm.errors import UserError
from megatron_slm.training.batch_schedule import length_of_training
from megatron_slm.training.caches import SPLITS

NAMES = dict(zip(SPLITS, ("training", "validation", "test"), strict=True))
# A limit, because Megatron counts the passes one by one and lists every document of each.
MOST_PASSES = 10**8

Span = tuple[float, float]


@dataclass(frozen=True)
class SplitPart:
    """A part of a dataset: some of its documents, in a row."""

    prefix: str
    """The dataset."""
    first: int
    """Number of the first document."""
    end: int
    """Number after that of the last document."""
    documents: int
    """Documents in the whole dataset."""
    tokens: int
    """Tokens in this part."""

    @classmethod
    def of(cls, prefix: str, index: Index, span: Span) -> SplitPart:
        """Cut out the part that Megatron would, with its own rounding.

        Args:
            prefix: the dataset.
            index: the dataset's index.
            span: where the part starts and ends, as shares of the dataset's documents.
        """
        documents = len(index.lengths)
        first, end = (round(edge * float(documents)) for edge in span)
        tokens = 0
        if first < end:
            before = int(index.offsets[end - 1]) - int(index.offsets[first])
            tokens = before // index.dtype.itemsize + int(index.lengths[end - 1])
        return cls(prefix, first, end, documents, tokens)


def check_parts(args: Namespace, indices: Mapping[str, Index]) -> None:
    """Check every part that the datasets are cut into.

    Args:
        args: the arguments after Megatron's validation.
        indices: the datasets' indices, by prefix; datasets that are not among them are skipped.

    Raises:
        UserError: Megatron would hang or fail on a part; names its dataset and documents.
    """
    blend, per_split = get_blend_and_blend_per_split(args)
    spans = [(0.0, 1.0)] * len(SPLITS) if blend is None else split_spans(args.split)
    blends = per_split or [blend] * len(SPLITS)
    for split, span, each, wanted in zip(SPLITS, spans, blends, drawn_samples(args), strict=True):
        if span is None or each is None or not all(prefix in indices for prefix in each[0]):
            continue
        parts = [SplitPart.of(prefix, indices[prefix], span) for prefix in each[0]]
        _check_split(args, split, parts, each[1], wanted, of_its_own=blend is None)


def split_spans(split: str) -> list[Span | None]:
    """Return where the training, validation and test parts of --split start and end, from 0 to 1.

    A part with a share of 0 is None.

    Raises:
        UserError: the option is not a list of shares.
    """
    try:
        shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError):
        shares = [math.nan]
    if not all(map(math.isfinite, shares)):
        raise UserError(
            f"--split {split}: give the shares of training, validation and test, such as 969,30,1"
        )
    spans: list[Span | None] = convert_split_vector_to_split_matrix(shares)
    return spans


def drawn_samples(args: Namespace) -> tuple[int, int | None, int]:
    """Return how many samples of each split Megatron asks for; None means all of them, once."""
    iterations, train = length_of_training(args)
    if args.phase_transition_iterations:  # a resumed run asks for those of its phase alone
        train = min(train, 1)
    points = 1 if args.skip_train else iterations // args.eval_interval + 1
    if args.start_eval_at_iter is not None and not args.skip_train:
        points = max(0, points - args.start_eval_at_iter // args.eval_interval)
    test = args.eval_iters * args.eval_global_batch_size
    return train, None if args.full_validation else points * test, test


def _check_split(
    args: Namespace,
    split: str,
    parts: Sequence[SplitPart],
    weights: Sequence[float] | None,
    wanted: int | None,
    of_its_own: bool,
) -> None:
    sets = of_its_own and args.multiple_validation_sets and split == "valid"
    alone = sets or (len(parts) == 1 and (of_its_own or weights is None))
    if weights is not None and (wanted is None or not alone):
        _check_weights(split, parts, weights, wanted)
    for part in parts:
        once = wanted is None or (weights is None and not alone)
        if part.tokens == 0 and not once:
            raise UserError(_empty(args, split, part, of_its_own))
        fewest = args.data_parallel_size if wanted is None else 1
        if once and part.tokens <= fewest * args.seq_length:
            raise UserError(
                f"{part.prefix}: its {NAMES[split]} part has {part.tokens} tokens, and Megatron, "
                f"which reads it once, needs at least {fewest * args.seq_length + 1} (--seq-length "
                f"{args.seq_length}): give it more documents"
                + ("" if wanted is None else ", or the datasets weights")
            )
        if not once and wanted * args.seq_length > part.tokens * MOST_PASSES:
            raise UserError(
                f"{part.prefix}: its {NAMES[split]} part has only {part.tokens} tokens, and the "
                f"run draws {wanted} samples of {args.seq_length}: give it more documents"
            )
    if weights is None and not alone and wanted is not None:
        _check_read_once(args, split, parts, wanted)


def _empty(args: Namespace, split: str, part: SplitPart, of_its_own: bool) -> str:
    """Say which documents make up a part without tokens."""
    number = f"{part.prefix} has {part.documents} document{'s' * (part.documents != 1)}"
    if of_its_own:
        return f"{number}, none of which has a token"
    shares = args.split.replace(" ", "")  # Megatron's default has some
    has = "none"
    if part.first < part.end:
        has = f"documents {part.first} to {part.end - 1}, which have no tokens"
    return (
        f"{number}, of which --split {shares} leaves the {NAMES[split]} part {has}; Megatron would "
        "wait for ever: give that part a larger share, or a share of 0 if the run does not need it"
    )


def _check_weights(
    split: str, parts: Sequence[SplitPart], weights: Sequence[float], wanted: int | None
) -> None:
    for part, weight in zip(parts, weights, strict=True):
        if not 0.0 < weight < math.inf:
            raise UserError(
                f"{part.prefix}: its weight in the blend is {weight:g}; give it one above 0, or "
                "leave the dataset out"
            )
    if wanted is None:
        raise UserError(
            f"--full-validation reads each {NAMES[split]} dataset once: name them without weights, "
            "with --valid-data-path"
        )


def _check_read_once(args: Namespace, split: str, parts: Sequence[SplitPart], wanted: int) -> None:
    """Refuse a blend without weights that would end in the middle of the run."""
    ends_early = split == "train" and (args.exit_interval or args.exit_duration_in_mins)
    available = sum((part.tokens - 1) // args.seq_length for part in parts)
    if available < wanted and args.dataloader_type != "cyclic" and not ends_early:
        raise UserError(
            f"the blend of {len(parts)} {NAMES[split]} datasets has no weights, so Megatron reads "
            f"it once: {available} samples, of {wanted} that the run draws; give each dataset a "
            "weight (WEIGHT PREFIX WEIGHT PREFIX), with which it is repeated"
        )
