"""Several references: their mean, or one for each dataset of a blend.

The mean of losses is the loss of the geometric mean of the references' probabilities (up to its
normalisation).  By domain, a sample's losses are those of its dataset's reference.  All references
score all samples, one after the other, so each costs its memory and a forward; with score caches
(reference losses by dataset, `tools/score_reference.py --by document`) they would cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_slm.reference.online import OnlineReference


class SeveralReferences:
    """Scores with all of them.

    Args:
        domains: numbers of the blend's datasets that each reference is for; None for the mean.
    """

    def __init__(
        self, references: Sequence[OnlineReference], domains: Sequence[int] | None
    ) -> None:
        self.references, self.domains = references, domains

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> Iterator[Any]:
        """As OnlineReference.score."""
        losses: list[list[Tensor | None]] = []
        entropies: list[list[Tensor | None]] = []
        batches: list[Any] = []
        for reference in self.references:
            batches = list(reference.score(micro_batches, count, micro_batch_size))
            losses.append([batch.reference_losses for batch in batches])
            entropies.append([batch.reference_entropies for batch in batches])
            micro_batches = iter(batches)
        for number, batch in enumerate(batches):
            batch.reference_losses = self._together([said[number] for said in losses], batch)
            batch.reference_entropies = self._together([said[number] for said in entropies], batch)
        return iter(batches)

    def _together(self, said: list[Tensor | None], batch: Any) -> Tensor | None:
        """What each reference said of a micro-batch, [b, s/c], as one."""
        known = [values for values in said if values is not None]
        if not known:  # not the last pipeline stage, or not asked for
            return None
        if self.domains is None:
            return torch.stack(known).mean(0)
        assert batch.domains is not None
        result = known[0]
        for domain, values in zip(self.domains[1:], known[1:], strict=True):
            result = torch.where((batch.domains == domain)[:, None], values, result)
        return result
