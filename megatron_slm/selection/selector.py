"""Choose tokens by their scores, from a micro-batch or from a whole step, and weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.carried import select_above
from megatron_slm.selection.settings import SelectionSettings
from megatron_slm.selection.tokens import Tokens
from megatron_slm.selection.top_fraction import (
    Placement,
    Selection,
    numbers_selected,
    select_top_fraction,
    selected_of,
)
from megatron_slm.selection.weights import Chosen, guard_weights
from megatron_slm.selection.within_documents import DocumentPlaces, select_within_documents


@dataclass(frozen=True)
class Ranks:
    """Where this rank stands among the ranks that share a step's tokens."""

    cp_group: ProcessGroup
    """The ranks that hold parts of the same sequences."""
    dp_cp_group: ProcessGroup
    """The ranks that hold any of the step's tokens, at this stage and tensor-parallel rank."""
    dp_rank: int
    """This rank's number among the data-parallel ranks."""
    dp_size: int
    """The number of data-parallel ranks."""
    tp_group: ProcessGroup | None = None
    """The ranks that hold the same tokens, on which a user's own functions are compared."""


@dataclass(frozen=True)
class Choice:
    """The tokens chosen, and what they count."""

    selected: Tensor
    """Which tokens are selected, bool [b, s]."""
    weights: Tensor | None
    """How much each token counts, float32 [b, s]; None if exactly the selected ones count, by 1."""
    threshold: Tensor
    """The lowest selected score, averaged over the sets with valid tokens, float32, 0-dim."""
    any_valid: Tensor
    """Whether any token is valid, bool, 0-dim."""

    def split(self, count: int) -> list[Choice]:
        """Split a choice from `count` micro-batches into the choices of each."""
        weights = [None] * count if self.weights is None else self.weights.chunk(count)
        return [
            Choice(selected, part, self.threshold, self.any_valid)
            for selected, part in zip(self.selected.chunk(count), weights, strict=True)
        ]


class TokenSelector:
    """Chooses tokens on one rank, with the settings of a run."""

    def __init__(self, settings: SelectionSettings, ranks: Ranks) -> None:
        self.settings = settings
        self.ranks = ranks

    def choose(
        self,
        scores: Tensor,
        valid: Tensor,
        ratio: float,
        domains: Tensor | None = None,
        documents: DocumentPlaces | None = None,
        tokens: Tokens | None = None,
    ) -> Choice:
        """Choose from one micro-batch, over the ranks of the scope.

        Scope global-batch is treated as micro-batch here: the first step has no carried threshold,
        and validation has no steps.

        Args:
            scores: the tokens' scores, float32 [b, s/c].
            valid: which tokens may be selected, bool [b, s/c].
            ratio: the ratio of datasets without one of their own.
            domains: the dataset of each sample, int64 [b]; None without a blend, or in validation,
                where `ratio` holds for all samples.
            documents: the documents of the tokens, which scope document needs.
            tokens: what the weight reads; None if it reads nothing but scores.
        """
        tokens = tokens or Tokens(scores, valid)
        if self.settings.scope == "document":
            assert documents is not None, "scope document needs documents"
            chosen = self._select_within(scores, valid, ratio, domains, documents)
        else:
            wide = self.settings.scope == "data-parallel"
            chosen = self._select(scores, valid, ratio, domains, 1, wide)
        return self._weigh(scores, valid, tokens, *chosen)

    def choose_from_step(
        self,
        scores: Tensor,
        valid: Tensor,
        ratio: float,
        domains: Tensor | None,
        count: int,
        tokens: Tokens | None = None,
    ) -> Choice:
        """Choose from all `count` micro-batches of a step, concatenated to [count * b, s/c]."""
        tokens = tokens or Tokens(scores, valid)
        chosen = self._select(scores, valid, ratio, domains, count, True)
        return self._weigh(scores, valid, tokens, *chosen)

    def select_from_step(
        self, scores: Tensor, valid: Tensor, ratio: float, domains: Tensor | None, count: int
    ) -> Selection:
        """Select as choose_from_step does, without weighing: for the thresholds."""
        selection, _, _ = self._select(scores, valid, ratio, domains, count, True)
        return selection

    def choose_above(
        self,
        scores: Tensor,
        valid: Tensor,
        thresholds: Tensor,
        domains: Tensor | None,
        tokens: Tokens | None = None,
    ) -> Choice:
        """Choose by thresholds, float32 [sets], carried from the steps before."""
        sets, _ = self.sets(len(scores), 1.0, domains, scores.device)
        placement = self._placement(len(scores), 1, False, scores.device)
        selection = select_above(scores, valid, thresholds, sets, placement)
        tokens = tokens or Tokens(scores, valid)
        return self._weigh(scores, valid, tokens, selection, sets, placement)

    def sets(
        self, samples: int, ratio: float, domains: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Sequence[float] | Tensor]:
        """Return the set of each sample, int64 [b], and the ratio of each set."""
        own = self.settings.domain_ratios
        by_sample = self.settings.scope == "sequence"
        if not own or domains is None:
            if by_sample:
                return torch.arange(samples, device=device), [ratio] * samples
            return torch.zeros(samples, dtype=torch.int64, device=device), [ratio]
        ratios = self._of_domains(ratio, device)
        if by_sample:
            return torch.arange(samples, device=device), ratios[domains]
        return domains, ratios

    def _of_domains(self, ratio: float, device: torch.device) -> Tensor:
        """Return the ratio of each of the blend's datasets, float64; `ratio` where it has none."""
        own = self.settings.domain_ratios
        return _on_device(tuple(ratio if value is None else value for value in own), device)

    def most_selected(self, samples: int, length: int, ratio: float) -> int | None:
        """Return the most tokens of a micro-batch, [samples, length], that can count.

        As many do count if none of them is masked.  None if only the device knows: when tokens
        compete within documents, or with those of other ranks or other micro-batches, when ratios
        depend on samples, or when tokens that are not selected count too.
        """
        settings = self.settings
        unknown = settings.scope in ("document", "data-parallel", "global-batch")
        soft = settings.weigher is not None and settings.weigher.function.of_all
        weighted = soft or settings.unselected_weight > 0.0
        if unknown or weighted or settings.domain_ratios or self.ranks.cp_group.size() > 1:
            return None
        if settings.scope == "sequence":
            return samples * selected_of(length, ratio)
        return selected_of(samples * length, ratio)

    def share_selected(
        self, valid: Tensor, ratio: float, domains: Tensor | None, count: int, whole: bool
    ) -> Tensor:
        """Return which share of a step's valid tokens will be selected, float32, 0-dim.

        The number of selected tokens follows from that of the valid ones, before there are scores.
        Collective over all ranks that hold any of the step's tokens, and without a host wait.

        Args:
            valid: which tokens of all `count` micro-batches may be selected, bool [count * b, s/c].
            ratio: the ratio of datasets without one of their own.
            domains: the dataset of each sample, int64 [count * b]; None without a blend.
            count: the number of micro-batches.
            whole: whether tokens compete over the whole step, or with a threshold carried from
                earlier ones, which selects as many in the mean.
        """
        sets, ratios = self.sets(len(valid), ratio, domains, valid.device)
        if self.settings.scope != "sequence" and not whole:
            which = torch.arange(len(valid), device=valid.device) // (len(valid) // count)
            sets = sets + which * len(ratios)
            ratios = ratios.repeat(count) if isinstance(ratios, Tensor) else [*ratios] * count
        wide = whole or self.settings.scope == "data-parallel"
        number = torch.zeros(len(ratios), dtype=torch.int64, device=valid.device)
        number.index_add_(0, sets, valid.sum(1))
        of_all = self.ranks.dp_cp_group
        group = of_all if wide else self.ranks.cp_group
        if group.size() > 1:
            torch.distributed.all_reduce(number, group=group)
        both = torch.stack([numbers_selected(number, ratios).sum(), number.sum()])
        if group.size() < of_all.size():  # each context-parallel rank adds the same to both
            torch.distributed.all_reduce(both, group=of_all)
        return (both[0] / both[1].clamp(min=1)).float()

    def _select(
        self,
        scores: Tensor,
        valid: Tensor,
        ratio: float,
        domains: Tensor | None,
        count: int,
        wide: bool,
    ) -> tuple[Selection, Tensor, Placement]:
        """Select exactly from `count` micro-batches, over the data-parallel ranks if `wide`.

        Returns:
            The selection, and the sets and the placement that it was made with.
        """
        sets, ratios = self.sets(len(scores), ratio, domains, scores.device)
        placement = self._placement(len(scores) // count, count, wide, scores.device)
        return select_top_fraction(scores, valid, ratios, sets, placement), sets, placement

    def _select_within(
        self,
        scores: Tensor,
        valid: Tensor,
        ratio: float,
        domains: Tensor | None,
        documents: DocumentPlaces,
    ) -> tuple[Selection, Tensor, Placement]:
        """Select from each document of one micro-batch; return what _select does."""
        samples = len(scores)
        sets, room = documents.sets(self.ranks.cp_group.size())
        ratios = torch.full((samples,), ratio, dtype=torch.float64, device=scores.device)
        if self.settings.domain_ratios and domains is not None:
            ratios = self._of_domains(ratio, scores.device)[domains]
        placement = self._placement(samples, 1, False, scores.device)
        selection = select_within_documents(
            scores,
            valid,
            ratios[:, None].expand(samples, room).flatten(),
            sets,
            documents.positions,
            placement,
        )
        return selection, sets, placement

    def _placement(self, samples: int, count: int, wide: bool, device: torch.device) -> Placement:
        """Return how `count` micro-batches of `samples` each lie over ranks; over the data-parallel
        ranks, too, if `wide`."""
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
        tokens: Tokens,
        selection: Selection,
        sets: Tensor,
        placement: Placement,
    ) -> Choice:
        settings, weigher = self.settings, self.settings.weigher
        weights = None
        if weigher is not None:
            where = valid if weigher.function.of_all else selection.selected
            chosen = Chosen(selection, where, sets, placement)
            known = tokens.also(scores=scores)
            weights = weigher(known, chosen, group=self.ranks.tp_group)
            weights = torch.where(where, weights, 0.0)
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
    """Copy ratios, which a schedule changes, to the device without making the host wait."""
    if device.type != "cuda":
        return torch.tensor(ratios, dtype=torch.float64)
    host = torch.tensor(ratios, dtype=torch.float64, pin_memory=True)
    return host.to(device, non_blocking=True)
