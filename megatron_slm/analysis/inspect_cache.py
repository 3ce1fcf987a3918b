"""Show what a score cache holds: the distribution of reference losses by domain.

Every record is read once, the way training reads it.  Losses are counted in a histogram of the
65,536 values of the 16-bit format, so percentiles are exact to that precision and memory use is
constant.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import defaultdict
from itertools import batched
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_slm.data.score_cache import (
    decode,
    encode,
    missing_shards,
    read_record,
    shard_path,
)
from megatron_slm.data.score_manifest import CacheManifest, read_cache_manifest
from megatron_slm.errors import UserError
from megatron_slm.files import writing

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
CODES = 1 << 16
RECORDS = 256  # read at a time
MOST_FAULTS = 20  # named in the error
Histograms = dict[str, NDArray[np.int64]]


def inspect(arguments: list[str]) -> None:
    """Print a table of a cache's losses by domain, and plot them if --plot is given.

    Args:
        arguments: command line after `score_reference.py inspect`.

    Raises:
        UserError: there is no cache, or shards are missing or damaged; the other shards are printed
            before that.
    """
    parser = ArgumentParser("score_reference.py inspect")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, SVG or PDF.")
    args = parser.parse_args(arguments)
    manifest = read_cache_manifest(args.cache)
    if manifest.values == "external":
        raise UserError(f"{args.cache} holds external values, and only losses can be shown")
    histograms, faults = count_losses(args.cache, manifest)
    print(f"{args.cache}: by {manifest.kind}, {manifest.dtype}, s = {manifest.sequence_length}")
    print(f"reference: {manifest.reference}")
    if manifest.kind == "document" and manifest.source.inter_document_masking is True:
        print("with padding: a window ends early where the next document would not fit into it")
    width = max(map(len, ["domain", *histograms]))
    print(
        f"{'domain':{width}} {'tokens':>15} {'mean':>8}"
        + "".join(f"{f'{p}%':>8}" for p in PERCENTILES)
    )
    for name, histogram in histograms.items():
        print(
            f"{name:{width}} {histogram.sum():15,} {mean(histogram):8.3f}"
            + "".join(f"{percentile(histogram, p):8.3f}" for p in PERCENTILES)
        )
    if args.plot and histograms:
        plot_losses(histograms, args.plot)
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise UserError("; ".join(faults[:MOST_FAULTS] + more))


def count_losses(directory: Path, manifest: CacheManifest) -> tuple[Histograms, list[str]]:
    """Count the tokens of a cache by domain and loss.

    Returns:
        For each domain an int64 histogram [65536] over the codes of the 16-bit format; and a list
        of what is wrong with the cache.
    """
    histograms: Histograms = defaultdict(lambda: np.zeros(CODES, np.int64))
    missing = set(missing_shards(directory, manifest))
    faults = [f"{shard_path(directory, *shard)} is missing" for shard in sorted(missing)]
    there = [
        (section, shard)
        for section in manifest.sections
        for shard in range(manifest.shards(section))
        if (section, shard) not in missing
    ]
    for section, shard in tqdm(there, unit="shard", disable=None):
        try:
            found = _count_shard(directory, manifest, section, shard)
        except UserError as error:
            faults.append(str(error))
            continue
        for name, histogram in found.items():
            histograms[name] += histogram
    return dict(sorted(histograms.items())), faults


def _count_shard(directory: Path, manifest: CacheManifest, section: str, shard: int) -> Histograms:
    names = _domains(manifest, section)
    histograms: Histograms = defaultdict(lambda: np.zeros(CODES, np.int64))
    for numbers in batched(manifest.records_of(section, shard), RECORDS):
        records = [read_record(directory, manifest, section, number) for number in numbers]
        domains = np.array([record["domain"] for record in records])
        losses = np.stack([record["losses"] for record in records])
        if domains.max() >= len(names):
            path = shard_path(directory, section, shard)
            raise UserError(
                f"{path} has losses of dataset number {domains.max()}, but there are {len(names)}"
            )
        codes = encode(losses, "uint16") if losses.dtype == np.float32 else losses
        for number in np.unique(domains).tolist():
            own = codes[domains == number].ravel()
            histograms[names[number]] += np.bincount(own, minlength=CODES)
    return histograms


def mean(histogram: NDArray[np.int64]) -> float:
    """Return the mean loss in nats of a histogram [65536] of tokens by 16-bit code."""
    return float(histogram @ VALUES) / max(1, int(histogram.sum()))


def percentile(histogram: NDArray[np.int64], percent: float) -> float:
    """Return the smallest loss in nats that at least `percent` per cent of the tokens do not
    exceed."""
    below = np.cumsum(histogram)
    return float(VALUES[np.searchsorted(below, below[-1] * percent / 100)])


def plot_losses(histograms: Histograms, path: Path) -> None:
    """Plot the density of each domain's losses up to the highest 99th percentile.

    Raises:
        UserError: matplotlib is not installed, or does not know the format of `path`.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'megatron-slm[analysis]'") from error
    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    end = max(percentile(histogram, 99) for histogram in histograms.values())
    edges = np.linspace(0.0, max(end, 0.1), 101)
    for name, histogram in histograms.items():
        # Shares of all tokens, including those beyond the last edge.
        shares = np.histogram(VALUES, edges, weights=histogram / histogram.sum())[0]
        density = np.asarray(shares) / (edges[1] - edges[0])
        axes.stairs(density, edges, label=f"{name} (mean {mean(histogram):.2f})")
    axes.set(xlabel="reference loss (nats)", ylabel="density")
    axes.legend(frameon=False)
    try:
        with writing(path) as unfinished:
            figure.savefig(unfinished, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from error
    pyplot.close(figure)
    print(f"> {path}")


def _domains(manifest: CacheManifest, section: str) -> list[str]:
    """Return the names of a section's domains, in the order of their numbers."""
    if manifest.kind == "document":
        return [section]
    blends = manifest.source.blends or {}
    names, _ = blends.get(section) or blends.get("all") or (["mock data"], None)
    return names


VALUES = decode(np.arange(CODES, dtype=np.uint16)).astype(np.float64)
