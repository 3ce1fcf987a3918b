"""Schedules of the token selection ratio, which are functions of the iteration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RatioSchedule:
    """A token selection ratio that changes as training proceeds."""

    start: float
    """Ratio at the first iteration, in (0, 1]."""
    kind: Literal["constant", "linear", "cosine", "steps"] = "constant"
    """How the ratio changes."""
    end: float | None = None
    """Ratio at the end of a linear or cosine schedule, in (0, 1]."""
    decay_iterations: int = 0
    """Iterations that a linear or cosine schedule takes."""
    steps: tuple[tuple[int, float], ...] = ()
    """Iterations, ascending, each with the ratio that holds from it on; for kind "steps"."""

    def at(self, iteration: int) -> float:
        """Return the ratio of an iteration, counted from 0."""
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
