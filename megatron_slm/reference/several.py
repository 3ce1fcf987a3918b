"""Score with several references: by the mean of their losses, or with one for each dataset.

The mean of the losses is the loss of the geometric mean of the references' probabilities (up to its
normalisation).  With one reference for each dataset of a blend, a sample's losses are those of its
dataset's reference.  All references score all samples, one after the other, so that each costs its
memory and a forward pass.  Score caches of each dataset (`tools/score_reference.py --by document`)
would cost neither.
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
    """A reference that combines the losses of several."""

    def __init__(
        self, references: Sequence[OnlineReference], domains: Sequence[int] | None
    ) -> None:
        """Combine references.

        Args:
            references: the references.
            domains: the number in the blend of the dataset that each reference is for; None to take
                the mean of all.
        """
        self.references, self.domains = references, domains

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> list[Scored]:
        """Score with one reference after the other, and combine their losses."""
        *theirs, read = tee(micro_batches, len(self.references) + 1)
        scored = [
            reference.score(batches, count, micro_batch_size)
            for reference, batches in zip(self.references, theirs, strict=True)
        ]
        together: list[Scored] = []
        for batch, *of_each in zip(read, *scored, strict=False):  # empty on other stages
            losses, entropies = zip(*of_each, strict=True)
            known = [values for values in entropies if values is not None]
            together.append((self._one(losses, batch), self._one(known, batch) if known else None))
        return together

    def _one(self, values_of_each: Sequence[Tensor], batch: Any) -> Tensor:
        """Combine what each reference returned for a micro-batch, [b, s/c]."""
        if self.domains is None:
            return torch.stack(list(values_of_each)).mean(0)
        assert batch.domains is not None
        result, *others = values_of_each
        for domain, values in zip(self.domains[1:], others, strict=True):
            result = torch.where((batch.domains == domain)[:, None], values, result)
        return result
