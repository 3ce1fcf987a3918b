"""Where reference losses come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class Reference(Protocol):
    """Gives a step's micro-batches (training/micro_batch.py) their reference losses."""

    def score(
        self, micro_batches: Iterator[Any], count: int, micro_batch_size: int
    ) -> Iterator[Any]:
        """The `count` micro-batches of a step, with reference_losses (and reference_entropies),
        float32 [b, s/c] in nats, set on the last pipeline stage.  Collective over the ranks that
        share them."""
