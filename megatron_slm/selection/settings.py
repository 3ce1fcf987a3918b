"""How a run selects and weighs tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from megatron_slm.selection.functions import Bound
from megatron_slm.selection.named import find_score, find_weight

Scope = Literal["document", "sequence", "micro-batch", "data-parallel", "global-batch"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class SelectionSettings:
    """How tokens are selected and weighed."""

    scope: Scope = "micro-batch"
    """The valid tokens that compete with each other for selection: those of one document of a
    sample, of one sequence, of one micro-batch, of the micro-batches that all data-parallel ranks
    hold at the same time, or of a whole step (global-batch)."""
    exact: bool = False
    """Whether scope global-batch ranks all tokens of the step in a forward pass of its own, and
    does not compare them with a threshold carried from the steps before."""
    score: str = "excess"
    """What tokens are ranked by (scores.py), or module:function."""
    weighting: str = "hard"
    """How tokens are weighed (weights.py), or module:function."""
    options: tuple[str, ...] = ()
    """Options of the score and of the weighting, each NAME=VALUE."""
    temperature: float = 1.0
    """Temperature of softmax weights."""
    unselected_weight: float = 0.0
    """Weight of the mean loss of unselected tokens."""
    domain_ratios: tuple[float | None, ...] = ()
    """Ratio of each of the blend's datasets, None where the schedule's holds; empty if no dataset
    has a ratio of its own."""

    @cached_property
    def scorer(self) -> Bound:
        """The score, as a function."""
        return find_score(self.score, self.options)

    @cached_property
    def weigher(self) -> Bound | None:
        """The weight, as a function; None if the selected tokens count alike."""
        return find_weight(self.weighting, self.options, self.temperature)

    @property
    def needs(self) -> frozenset[str]:
        """The fields of Tokens that score and weight read."""
        return self.scorer.needs | (self.weigher.needs if self.weigher else frozenset())
