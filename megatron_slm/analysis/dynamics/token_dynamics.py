"""Classify tokens by how their loss changes over training, as in Rho-1, appendix B.1.

A least-squares line is fitted to each token's losses over the checkpoints.  The class depends on
the difference between the line's two ends:

    H->L   the line falls by more than 0.2 nats
    L->H   the line rises by more than 0.2 nats
    L->L   neither, and the token's last loss is at most the mean of all tokens' last losses
    H->H   neither, and the token's last loss is above that mean
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_slm.data.token_dump import TokenDump
from megatron_slm.errors import UserError

CLASSES = ("H->H", "H->L", "L->H", "L->L")
THRESHOLD = 0.2  # nats


@dataclass(frozen=True)
class TokenDynamics:
    """The losses of T unmasked tokens at K checkpoints, and the class of each token."""

    iterations: list[int]
    """[K], the iteration of each checkpoint, ascending."""

    losses: NDArray[np.float32]
    """[K, T], in nats."""

    classes: NDArray[np.int8]
    """[T], indices into CLASSES."""

    delta: NDArray[np.float32]
    """[T], in nats: the end of the fitted line minus its start."""

    samples: NDArray[np.int64]
    """[T], the number of the sample that the token is in."""

    positions: NDArray[np.int64]
    """[T], how many tokens precede the token in its sample."""

    tokens: NDArray[np.int64]
    """[T], token ids."""

    documents: NDArray[np.int64] | None = None
    """[T], the number within its sample of the document that the token is in; None where documents
    see each other."""

    domains: NDArray[np.str_] | None = None
    """[T], the name of the dataset that the token is from; None where it is not known."""

    def share(self, name: str) -> float:
        """Return the fraction of all tokens that are in a class."""
        return float(np.mean(self.classes == CLASSES.index(name)))

    def mean_curve(self, name: str) -> NDArray[np.float64]:
        """Return a class's mean loss in nats at each checkpoint, [K]; NaN if it has no tokens."""
        own = self.losses[:, self.classes == CLASSES.index(name)]
        if own.shape[1] == 0:
            return np.full(len(self.iterations), np.nan)
        return np.asarray(own.mean(axis=1, dtype=np.float64))

    def examples(self, name: str, count: int) -> list[int]:
        """Return the indices of up to `count` tokens of a class, evenly spaced from the strongest
        change to the weakest."""
        own = np.flatnonzero(self.classes == CLASSES.index(name))
        order = own[np.argsort(-np.abs(self.delta[own]), kind="stable")]
        steps = np.linspace(0, len(order) - 1, min(count, len(order)))
        return [int(order[round(at)]) for at in steps.tolist()]


def classify(dumps: list[TokenDump]) -> TokenDynamics:
    """Classify the tokens that the dumps of a run have in common.

    Raises:
        UserError: there are fewer than two dumps (a line needs two points), or a loss is not
            finite.
    """
    if len(dumps) < 2:
        raise UserError("token dynamics need the losses of at least two iterations")
    valid = dumps[0].valid
    losses = np.stack([dump.losses[valid] for dump in dumps])
    iterations = [dump.iteration for dump in dumps]
    for iteration, own in zip(iterations, losses, strict=True):
        if not np.isfinite(own).all():
            raise UserError(
                f"losses of iteration {iteration} are NaN or infinite: move its dump out of the "
                "directory, or leave it out of --ckpt-steps"
            )
    delta = fitted_change(iterations, losses)
    low = losses[-1] <= losses[-1].mean(dtype=np.float64)
    classes = np.where(low, CLASSES.index("L->L"), CLASSES.index("H->H"))
    classes[delta < -THRESHOLD] = CLASSES.index("H->L")
    classes[delta > THRESHOLD] = CLASSES.index("L->H")
    row, column = np.nonzero(valid)
    documents, begins = dumps[0].documents, dumps[0].begins()
    if documents is not None and begins is not None:
        documents = documents + begins  # of the token itself, and not of the one before it
    return TokenDynamics(
        iterations=iterations,
        losses=losses,
        classes=classes.astype(np.int8),
        delta=delta.astype(np.float32),
        samples=dumps[0].samples[row],
        positions=column + 1,
        tokens=dumps[0].tokens[row, column + 1].astype(np.int64),
        documents=None if documents is None else documents[row, column].astype(np.int64),
        domains=np.array(domains)[row] if (domains := dumps[0].about.domains) else None,
    )


def fitted_change(iterations: list[int], losses: NDArray[np.float32]) -> NDArray[np.float64]:
    """Fit a least-squares line to each token's losses; return its end minus its start.

    Args:
        iterations: [K].
        losses: [K, T], in nats.

    Returns:
        [T], in nats.
    """
    at = np.asarray(iterations, np.float64)
    away = at - at.mean()
    slope = away @ losses.astype(np.float64) / (away @ away)
    return np.asarray(slope * (at[-1] - at[0]))
