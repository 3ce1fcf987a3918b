"""Find when each token is learned, by a sigmoid fitted to its losses (after arXiv 2606.29858).

With x = ln(1 + iteration) and the logistic function s, a token's loss is taken to be

    loss(x) = end + fall * s(-(x - time) / width)

The two linear parameters have a closed form for each time and width, so these two are searched on a
grid, the same for all tokens, and the best of all its curves is found whatever the noise.  Times
lie between the first checkpoint and the last; widths from a quarter of the mean distance of
neighbouring checkpoints, below which they cannot be told apart, to half of the whole.

A token is learned if the curve falls by more than THRESHOLD nats between the first checkpoint and
the last, and explains its losses better than noise would let it: what the curve explains of their
variance, over what it leaves, each by its degrees of freedom (3 and K - 4), is at least LEAST_F.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.dynamics.token_dynamics import THRESHOLD

LEAST_CHECKPOINTS = 5  # one more than the curve has parameters
LEAST_F = 6.0  # of losses that are noise alone, less than 3% pass
TIMES, WIDTHS = 64, 24
CHUNK = 1 << 13  # tokens fitted at once
MOST_BINS = 24


@dataclass(frozen=True)
class LearningTimes:
    """When each of T tokens was learned; NaN for those that were not."""

    times: NDArray[np.float32]
    """[T], in iterations: half of the fall has happened."""

    widths: NDArray[np.float32]
    """[T], in units of ln(1 + iteration): the middle half of the fall takes a factor of
    9 ** width."""

    @property
    def learned(self) -> NDArray[np.bool_]:
        """[T], which tokens were learned."""
        return np.isfinite(self.times)


def learning_times(iterations: list[int], losses: NDArray[np.float32]) -> LearningTimes | None:
    """Fit a sigmoid to the losses of each token.

    Args:
        iterations: [K], ascending.
        losses: [K, T], in nats; a token with one that is not finite counts as not learned.

    Returns:
        The times and widths; None for fewer than LEAST_CHECKPOINTS checkpoints.
    """
    if len(iterations) < LEAST_CHECKPOINTS:
        return None
    x = np.log1p(np.asarray(iterations, np.float64))
    times, widths, curves = _grid(x)
    centred = curves - curves.mean(axis=1, keepdims=True)
    sizes = np.sqrt((centred**2).sum(axis=1))
    directions = (centred / sizes[:, None]).astype(np.float32)
    found = [np.empty(losses.shape[1], np.float32) for _ in range(2)]
    for start in range(0, losses.shape[1], CHUNK):
        own = slice(start, start + CHUNK)
        finite = np.isfinite(losses[:, own]).all(axis=0)
        values = np.where(finite, losses[:, own], np.float32(0))
        values -= values.mean(axis=0)
        # What a curve explains of a token's sum of squares is the square of this; where it is
        # negative, the curve would have to rise.
        along = values.T @ directions.T  # [tokens, G], so that a token's places lie together
        best = along.argmax(axis=1)
        strength = along[np.arange(len(best)), best]
        fall = (curves[best, 0] - curves[best, -1]) * strength / sizes[best]
        left = (values**2).sum(axis=0) - strength**2
        explains = strength**2 / 3 >= LEAST_F * left / (len(x) - 4)
        learned = finite & explains & (fall > THRESHOLD)
        for target, grid in zip(found, (np.expm1(times), widths), strict=True):
            target[own] = np.where(learned, grid[best], np.nan)
    return LearningTimes(*found)


def _grid(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return the time, [G], width, [G], and curve, [G, K], of each place in the grid."""
    whole = x[-1] - x[0]
    narrowest = whole / (len(x) - 1) / 4
    times = np.linspace(x[0], x[-1], TIMES)
    widths = np.geomspace(narrowest, whole / 2, WIDTHS)
    times, widths = (each.ravel() for each in np.meshgrid(times, widths, indexing="ij"))
    away = (x - times[:, None]) / widths[:, None]
    return times, widths, (1.0 - np.tanh(away / 2)) / 2


def spectrum(
    iterations: list[int], found: LearningTimes, own: NDArray[np.bool_]
) -> tuple[list[float], list[float]]:
    """Return the learning-time spectrum of some tokens: how many are learned, and when.

    Args:
        iterations: [K], ascending.
        found: when each of T tokens was learned.
        own: [T], which tokens to count.

    Returns:
        The decimal logarithm of 1 + iteration at the middle of each bin, which goes from one
        checkpoint to a later one; and the percentage of the tokens that are learned in it, over
        its width, so that the area below is the percentage learned.
    """
    edges = np.log10(1.0 + np.asarray(iterations, np.float64))
    edges = edges[:: -(-(len(edges) - 1) // MOST_BINS)]
    if edges[-1] < (last := np.log10(1.0 + iterations[-1])):
        edges = np.append(edges, last)
    times = np.log10(1.0 + found.times[own & found.learned].astype(np.float64))
    counts, _ = np.histogram(np.clip(times, edges[0], edges[-1]), edges)
    shares = 100.0 * counts / max(1, int(own.sum())) / np.diff(edges)
    return ((edges[:-1] + edges[1:]) / 2).tolist(), shares.tolist()
