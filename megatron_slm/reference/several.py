"""Several references: their mean, or one for each dataset of a blend.

The mean of losses is the loss of the geometric mean of the references' probabilities (up to its
normalisation).  By domain, a sample's losses are those of its dataset's reference.  All references
score all samples, one after the other, so each costs its memory and a forward; with score caches
(reference losses by dataset, `tools/score_reference.py --by document`) they would cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from megatron_slm.reference import Reference, Scored
from megatron_slm.reference.online import OnlineReference


class SeveralReferences(Reference):
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
    ) -> list[Scored]:
        """Score with one after the other, and put their losses together."""
        *theirs, read = tee(micro_batches, len(self.references) + 1)
        scored = [
            reference.score(batches, count, micro_batch_size)
            for reference, batches in zip(self.references, theirs, strict=True)
        ]
        together: list[Scored] = []
        for batch, *of_each in zip(read, *scored, strict=False):  # other stages have none
            losses, entropies = zip(*of_each, strict=True)
            known = [values for values in entropies if values is not None]
            together.append((self._one(losses, batch), self._one(known, batch) if known else None))
        return together

    def _one(self, values_of_each: Sequence[Tensor], batch: Any) -> Tensor:
        """Return as one what the references said of a micro-batch, [b, s/c] each."""
        if self.domains is None:
            return torch.stack(list(values_of_each)).mean(0)
        assert batch.domains is not None
        result, *others = values_of_each
        for domain, values in zip(self.domains[1:], others, strict=True):
            result = torch.where((batch.domains == domain)[:, None], values, result)
        return result
