"""Compute LongPPL: a model's perplexity on the tokens that a long context makes likelier.

A token is a key token if an evaluator's loss of it falls by more than alpha from a short context to
a long one, to less than -beta (arXiv 2410.23771; the defaults are those of its authors' code).  The
losses are those of three score caches by document.  The authors' short context has K tokens or some
more; here those tokens are looked at whose short context has at least half of a short window, and
whose long context exceeds the short window.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from megatron_slm.data.indexed_format import open_index
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import CacheManifest, cache_differences, read_cache_manifest
from megatron_slm.data.windows import Windows
from megatron_slm.errors import UserError

TOKENS_AT_ONCE = 1 << 20
MOST_NATS = 700.0  # nats, of which exp is a float


@dataclass
class KeyTokens:
    """What was found of a dataset's tokens, or of several datasets'."""

    tokens: int = 0
    """Tokens that were looked at."""
    loss: float = 0.0
    """The sum of the model's losses of these."""
    key_tokens: int = 0
    """The key tokens among them."""
    key_loss: float = 0.0
    """The sum of the model's losses of the key tokens."""

    def __add__(self, other: KeyTokens) -> KeyTokens:
        return KeyTokens(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.key_tokens + other.key_tokens,
            self.key_loss + other.key_loss,
        )


def longppl(arguments: list[str]) -> None:
    """Print a table of a model's perplexities on all tokens and on key tokens, by dataset.

    Args:
        arguments: command line after `score_reference.py longppl`.

    Raises:
        UserError: a cache is not one of losses by document, or of other files than the datasets'.
    """
    parser = ArgumentParser("score_reference.py longppl")
    add = parser.add_argument
    add("cache", type=Path, help="The model's losses, with a long --seq-length.")
    add(
        "--evaluator",
        type=Path,
        nargs=2,
        required=True,
        metavar=("LONG", "SHORT"),
        help="Losses of the model that tells key tokens, with a long and a short --seq-length.",
    )
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help="The datasets.")
    add("--alpha", type=float, default=2.0, help="Nats that key tokens gain. Default: 2.")
    add("--beta", type=float, default=-2.0, help="Their least log-probability. Default: -2.")
    args = parser.parse_args(arguments)
    directories = [args.cache, *args.evaluator]
    manifests = [read_cache_manifest(directory) for directory in directories]
    _, long, short = manifests
    if differs := cache_differences(short.reference, long.reference):
        raise UserError(f"--evaluator: {differs}: give two caches of one model")
    if len({manifest.source.inter_document_masking for manifest in manifests}) > 1:
        raise UserError(
            "some of these caches were scored with --dataloader-inter-document-masking and some "
            "without: contexts would begin at different places"
        )
    found = {}
    for prefix in args.data_path:
        three = [
            _Losses(directory, manifest, prefix)
            for directory, manifest in zip(directories, manifests, strict=True)
        ]
        found[Path(prefix).name] = of_dataset(*three, alpha=args.alpha, beta=args.beta)
    if len(found) > 1:
        found["all datasets"] = sum(found.values(), KeyTokens())
    lengths = (f"{manifest.sequence_length:,}" for manifest in manifests)
    print("windows of {} tokens; the evaluator's have {} and {}".format(*lengths))
    width = max(map(len, ["dataset", *found]))
    print(f"{'dataset':{width}} {'tokens':>15} {'PPL':>10} {'key tokens':>15} {'LongPPL':>10}")
    for name, one in found.items():
        print(
            f"{name:{width}} {one.tokens:15,} {perplexity(one.loss, one.tokens):>10}"
            f" {one.key_tokens:15,} {perplexity(one.key_loss, one.key_tokens):>10}"
        )


class _Losses:
    """The losses that a cache has of a dataset's tokens."""

    def __init__(self, directory: Path, manifest: CacheManifest, prefix: str) -> None:
        """Open a cache.

        Raises:
            UserError: it is not one of losses by document, or not of this dataset.
        """
        # Imported here, so that --help needs no torch.
        from megatron_slm.data.scored_dataset import dataset_fingerprint, dataset_name

        name = dataset_name(prefix)
        if manifest.kind != "document" or manifest.values is not UNSET:
            raise UserError(f"{directory} does not hold losses by document: score it --by document")
        if name not in manifest.sections:
            known = ", ".join(manifest.sections)
            raise UserError(f"{directory} has no losses of --data-path {prefix}, only of {known}")
        own = dataset_fingerprint(prefix)
        if differs := cache_differences(own, manifest.source.datasets[name]):
            raise UserError(f"{directory} was scored from other files than {prefix}: {differs}")
        lengths = open_index(Path(f"{prefix}.idx")).lengths
        apart = manifest.source.inter_document_masking is True
        self.windows = Windows(lengths, manifest.sequence_length, apart)
        self.directory = directory
        self.section = Section(directory, manifest, name)

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the losses of the tokens at ascending positions in the file."""
        numbers, places = self.windows.places(positions)
        losses = np.empty(len(positions), np.float32)
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(numbers)]):
            losses[start:stop] = self.section.losses(int(numbers[start]), None)[places[start:stop]]
        return losses

    def contexts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens each was predicted from."""
        _, places = self.windows.places(positions)
        first, bounds = positions - places, self.windows.bounds
        if bounds is not None:  # no further back than the document
            first = np.maximum(first, bounds[np.searchsorted(bounds, positions, side="right") - 1])
        return np.asarray(positions - first + 1)


def of_dataset(
    model: _Losses, long: _Losses, short: _Losses, *, alpha: float, beta: float
) -> KeyTokens:
    """Look at a dataset's tokens.

    Args:
        model: the model's losses.
        long: the evaluator's losses with a long context.
        short: its losses with a short one.
        alpha: a key token's loss falls by more than this with the long context.
        beta: its log-probability with the long context is above this.

    Raises:
        UserError: no token has a longer context in `long` than the windows of `short`.
    """
    found, length = KeyTokens(), short.windows.length
    for positions in _blocks(long.windows.tokens):
        enough = (short.contexts(positions) >= length // 2) & (long.contexts(positions) > length)
        losses, with_long, with_short = (one.at(positions) for one in (model, long, short))
        key = enough & (with_short - with_long > alpha) & (with_long < -beta)
        of_all, of_key = (losses[which].sum(dtype=np.float64) for which in (enough, key))
        found += KeyTokens(int(enough.sum()), float(of_all), int(key.sum()), float(of_key))
    if not found.tokens:
        raise UserError(
            f"no token of {long.section.name} has a longer context in {long.directory}, whose "
            f"windows have {long.windows.length} tokens, than the {length} of {short.directory}: "
            "score LONG with a longer --seq-length, or leave the dataset out if its documents are "
            "that short"
        )
    return found


def _blocks(tokens: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, tokens, TOKENS_AT_ONCE):
        yield np.arange(start, min(start + TOKENS_AT_ONCE, tokens))


def perplexity(loss: float, tokens: int) -> str:
    """Format exp(loss / tokens), or a dash if there are no tokens."""
    if not tokens:
        return "-"
    return f"{math.exp(loss / tokens):.3f}" if loss / tokens < MOST_NATS else "inf"
