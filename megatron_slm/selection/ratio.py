"""How the token selection ratio changes as training proceeds: a function of the iteration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RatioSchedule:
    """From `start` to `end` over `decay_iterations`, or in steps.

    start, end: ratios in (0, 1].
    steps: (iteration, ratio): from that iteration on; ascending.  For kind "steps" alone.
    """

    start: float
    kind: Literal["constant", "linear", "cosine", "steps"] = "constant"
    end: float | None = None
    decay_iterations: int = 0
    steps: tuple[tuple[int, float], ...] = ()

    def at(self, iteration: int) -> float:
        """The ratio of an iteration, counted from 0."""
        if self.kind == "constant":
            return self.start
        if self.kind == "steps":
            passed = [ratio for first, ratio in self.steps if iteration >= first]
            return passed[-1] if passed else self.start
        assert self.end is not None
        progress = min(1.0, iteration / self.decay_iterations)
        if self.kind == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.start + (self.end - self.start) * progress
