"""How the loss of each token changes over training: the four classes of Rho-1, appendix B.1.

A least-squares line is fitted to a token's losses over the checkpoints, and the difference of its
ends looked at:

    H->L   it falls by more than 0.2 nats      L->H   it rises by more than 0.2
    L->L   neither, and the last loss is at most the mean of all tokens' last losses
    H->H   neither, and it is above
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
    """T tokens that count at K checkpoints.

    iterations: [K].  losses: float32 [K, T], nats.
    classes: int8 [T], positions in CLASSES.  delta: float32 [T], nats from end to end of the line.
    samples, positions, tokens: int [T], which token it is: of which sample, after how many others,
        and its id.
    """

    iterations: list[int]
    losses: NDArray[np.float32]
    classes: NDArray[np.int8]
    delta: NDArray[np.float32]
    samples: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def share(self, name: str) -> float:
        """Part of the tokens that are of a class."""
        return float(np.mean(self.classes == CLASSES.index(name)))

    def mean_curve(self, name: str) -> NDArray[np.float64]:
        """Mean loss of a class at each checkpoint, [K]; NaN for a class without tokens."""
        own = self.losses[:, self.classes == CLASSES.index(name)]
        if own.shape[1] == 0:
            return np.full(len(self.iterations), np.nan)
        return np.asarray(own.mean(axis=1, dtype=np.float64))

    def examples(self, name: str, count: int) -> list[int]:
        """Tokens of a class, from the strongest change to the weakest in even steps."""
        own = np.flatnonzero(self.classes == CLASSES.index(name))
        order = own[np.argsort(-np.abs(self.delta[own]), kind="stable")]
        steps = np.linspace(0, len(order) - 1, min(count, len(order)))
        return [int(order[round(at)]) for at in steps.tolist()]


def classify(dumps: list[TokenDump]) -> TokenDynamics:
    """
    Raises:
        UserError: fewer than two dumps, no line goes through one point; a loss that is no number.
    """
    if len(dumps) < 2:
        raise UserError("token dynamics need the losses of two iterations at least")
    valid = dumps[0].valid
    losses = np.stack([dump.losses[valid] for dump in dumps])
    iterations = [dump.iteration for dump in dumps]
    for iteration, own in zip(iterations, losses, strict=True):
        if not np.isfinite(own).all():
            raise UserError(f"losses of iteration {iteration} are NaN or infinite: leave it out")
    delta = fitted_change(iterations, losses)
    low = losses[-1] <= losses[-1].mean(dtype=np.float64)
    classes = np.where(low, CLASSES.index("L->L"), CLASSES.index("H->H"))
    classes[delta < -THRESHOLD] = CLASSES.index("H->L")
    classes[delta > THRESHOLD] = CLASSES.index("L->H")
    row, column = np.nonzero(valid)
    return TokenDynamics(
        iterations=iterations,
        losses=losses,
        classes=classes.astype(np.int8),
        delta=delta.astype(np.float32),
        samples=dumps[0].samples[row],
        positions=column + 1,
        tokens=dumps[0].tokens[row, column + 1].astype(np.int64),
    )


def fitted_change(iterations: list[int], losses: NDArray[np.float32]) -> NDArray[np.float64]:
    """End minus start of the least-squares line through each token's losses, [K, T] -> [T]."""
    at = np.asarray(iterations, np.float64)
    away = at - at.mean()
    slope = away @ losses.astype(np.float64) / (away @ away)
    return np.asarray(slope * (at[-1] - at[0]))
