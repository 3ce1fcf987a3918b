"""From the scores of a micro-batch, or of all of a step's, to the weight of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.carried import select_above
from megatron_slm.selection.scores import Score
from megatron_slm.selection.top_fraction import (
    Placement,
    Selection,
    select_top_fraction,
    selected_of,
)
from megatron_slm.selection.weights import Weighting, guard_weights, soft_weights

Scope = Literal["sequence", "micro-batch", "data-parallel", "global-batch"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class SelectionSettings:
    """scope: which tokens compete with each other for selection.
        sequence        the valid tokens of one sequence
        micro-batch     of one micro-batch
        data-parallel   of the micro-batches that all data-parallel ranks have at the same time
        global-batch    of a whole step
    exact: for global-batch, rank all tokens of the step in a forward pass of its own (True), or
        compare with a threshold carried from the steps before (False).
    score, weighting, temperature, unselected_weight: see scores.py and weights.py.
    domain_ratios: own ratios of the blend's datasets, None where the schedule's holds; empty if no
        dataset has its own.
    """

    scope: Scope = "micro-batch"
    exact: bool = False
    score: Score = "excess"
    weighting: Weighting = "hard"
    temperature: float = 1.0
    unselected_weight: float = 0.0
    domain_ratios: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """Where this rank stands among those that share a step's tokens.

    cp_group: ranks with other parts of the same sequences.
    dp_cp_group: ranks with any tokens of the step, at the same stage and tensor-parallel rank.
    """

    cp_group: ProcessGroup
    dp_cp_group: ProcessGroup
    dp_rank: int
    dp_size: int


@dataclass(frozen=True)
class Choice:
    """selected: bool [b, s].  weights: float32 [b, s], or None where they are the selected.
    threshold: float32 0-dim, the mean over sets with valid tokens.  any_valid: bool 0-dim.
    """

    selected: Tensor
    weights: Tensor | None
    threshold: Tensor
    any_valid: Tensor


class TokenSelector:
    """Selection by one set of settings on one rank."""

    def __init__(self, settings: SelectionSettings, ranks: Ranks) -> None:
        self.settings = settings
        self.ranks = ranks

    def choose(
        self, scores: Tensor, valid: Tensor, ratio: float, domains: Tensor | None = None
    ) -> Choice:
        """Choose from one micro-batch, over the ranks of the scope.

        Scope global-batch is taken as micro-batch here: its first step has no threshold to carry,
        and validation has no steps.

        Args:
            scores: float32 [b, s/c].  valid: bool [b, s/c].
            ratio: of the datasets without a ratio of their own.
            domains: int64 [b], the dataset of each sample; None where there is no blend, as in
                validation, and then all take `ratio`.
        """
        wide = self.settings.scope == "data-parallel"
        return self._weigh(scores, valid, *self._select(scores, valid, ratio, domains, 1, wide))

    def choose_from_step(
        self, scores: Tensor, valid: Tensor, ratio: float, domains: Tensor | None, count: int
    ) -> Choice:
        """Choose from all micro-batches of a step: [count * b, s/c], one after the other."""
        return self._weigh(scores, valid, *self._select(scores, valid, ratio, domains, count, True))

    def select_from_step(
        self, scores: Tensor, valid: Tensor, ratio: float, domains: Tensor | None, count: int
    ) -> Selection:
        """The same, without weights: for its thresholds."""
        selection, _, _ = self._select(scores, valid, ratio, domains, count, True)
        return selection

    def choose_above(
        self, scores: Tensor, valid: Tensor, thresholds: Tensor, domains: Tensor | None
    ) -> Choice:
        """Choose by thresholds, float32 [sets], carried from the steps before."""
        sets, _ = self.sets(len(scores), 1.0, domains, scores.device)
        placement = self._placement(len(scores), 1, False, scores.device)
        selection = select_above(scores, valid, thresholds, sets, placement)
        return self._weigh(scores, valid, selection, sets, placement)

    def sets(
        self, samples: int, ratio: float, domains: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Sequence[float] | Tensor]:
        """The set of each sample, int64 [b], and the ratio of each set."""
        own = self.settings.domain_ratios
        of_domains = [ratio if value is None else value for value in own]
        by_sample = self.settings.scope == "sequence"
        if not own or domains is None:
            if by_sample:
                return torch.arange(samples, device=device), [ratio] * samples
            return torch.zeros(samples, dtype=torch.int64, device=device), [ratio]
        ratios = _on_device(tuple(of_domains), device)
        if by_sample:
            return torch.arange(samples, device=device), ratios[domains]
        return domains, ratios

    def most_selected(self, samples: int, length: int, ratio: float) -> int | None:
        """Return how many tokens of a micro-batch, [samples, length], count at most: so many do if
        none of them is masked.

        None where only the device knows: when tokens compete with those of other ranks or other
        micro-batches, ratios depend on samples, or tokens that are not selected count too.
        """
        settings = self.settings
        wide = settings.scope in ("data-parallel", "global-batch")
        weighted = settings.weighting != "hard" or settings.unselected_weight > 0.0
        if wide or weighted or settings.domain_ratios or self.ranks.cp_group.size() > 1:
            return None
        if settings.scope == "sequence":
            return samples * selected_of(length, ratio)
        return selected_of(samples * length, ratio)

    def _select(
        self,
        scores: Tensor,
        valid: Tensor,
        ratio: float,
        domains: Tensor | None,
        count: int,
        wide: bool,
    ) -> tuple[Selection, Tensor, Placement]:
        """Exactly, from `count` micro-batches, over the data-parallel ranks if `wide`; with the
        sets and the placement it was made by."""
        sets, ratios = self.sets(len(scores), ratio, domains, scores.device)
        placement = self._placement(len(scores) // count, count, wide, scores.device)
        return select_top_fraction(scores, valid, ratios, sets, placement), sets, placement

    def _placement(self, samples: int, count: int, wide: bool, device: torch.device) -> Placement:
        """Of `count` micro-batches of `samples` each, over the data-parallel ranks if `wide`."""
        ranks = self.ranks
        rank, size = (ranks.dp_rank, ranks.dp_size) if wide else (0, 1)
        group = ranks.dp_cp_group if wide else ranks.cp_group
        numbers = None
        if group.size() > 1:
            first = (torch.arange(count, device=device) * size + rank) * samples
            numbers = (first[:, None] + torch.arange(samples, device=device)).flatten()
        return Placement(
            samples=numbers,
            total=count * size * samples,
            run=samples,
            cp_rank=ranks.cp_group.rank(),
            cp_size=ranks.cp_group.size(),
            group=group,
        )

    def _weigh(
        self,
        scores: Tensor,
        valid: Tensor,
        selection: Selection,
        sets: Tensor,
        placement: Placement,
    ) -> Choice:
        settings = self.settings
        weights = None
        if settings.weighting != "hard":
            weights = soft_weights(
                scores,
                valid,
                selection,
                settings.weighting,
                settings.temperature,
                sets,
                placement,
            )
        if settings.unselected_weight > 0.0:
            guard = guard_weights(valid, selection, settings.unselected_weight, sets)
            weights = (selection.selected.float() if weights is None else weights) + guard
        with_tokens = selection.count > 0
        thresholds = torch.where(with_tokens, selection.threshold, 0.0)
        if len(thresholds) == 1:
            threshold, any_valid = thresholds[0], with_tokens[0]
        else:
            threshold = thresholds.sum() / with_tokens.sum().clamp(min=1)
            any_valid = with_tokens.any()
        return Choice(selection.selected, weights, threshold, any_valid)


@lru_cache(maxsize=4)
def _on_device(ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """Ratios as a float64 tensor, for which the host does not wait: a schedule changes them."""
    if device.type != "cuda":
        return torch.tensor(ratios, dtype=torch.float64)
    host = torch.tensor(ratios, dtype=torch.float64, pin_memory=True)
    return host.to(device, non_blocking=True)
