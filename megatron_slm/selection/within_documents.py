"""Select exactly the top fraction of each document's scores, by sorting them.

A micro-batch may have as many documents as tokens, and only the device knows how many.  Histograms
of them all (top_fraction.py) would be far larger than the scores themselves, so the scores are
sorted, by document first.  With context parallelism, each rank gathers the micro-batch's 16 bytes a
token before it sorts: a document never reaches beyond a sample, and so not beyond these ranks.
Shapes depend on those of the micro-batch alone.  Nothing synchronises with the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.selection.top_fraction import (
    Placement,
    Selection,
    descending_keys,
    in_units,
    round_half_up,
    score_of_key,
)

_KEY_BITS = 32


@dataclass(frozen=True)
class DocumentPlaces:
    """Where a rank's tokens lie in the documents of their samples."""

    numbers: Tensor
    """The number of each token's document within its sample, from 0, int64 [b, s/c]."""
    positions: Tensor
    """How many tokens precede each token in its document, int64 [b, s/c]."""

    def sets(self, cp_size: int) -> tuple[Tensor, int]:
        """Give each document of all samples a number, with room for one at each of their tokens.

        Args:
            cp_size: context-parallel size, c.

        Returns:
            The number of each token's document, int64 [b, s/c], and how many numbers there are for
            each sample.
        """
        samples, length = self.numbers.shape
        room = length * cp_size
        first = torch.arange(samples, device=self.numbers.device) * room
        return first[:, None] + self.numbers, room


def select_within_documents(
    scores: Tensor,
    valid: Tensor,
    ratios: Tensor,
    sets: Tensor,
    positions: Tensor,
    placement: Placement,
) -> Selection:
    """Select k = max(1, round_half_up(ratio * N)) of the N valid tokens of each document.

    Rounding and ties are those of select_top_fraction.  One all-gather over the context-parallel
    ranks, if there are any.

    Args:
        scores: this rank's part of b samples, float32 [b, s/c]; not NaN where valid.
        valid: which tokens may be selected, bool [b, s/c].
        ratios: the ratio of each document, in (0, 1], float64 [documents].
        sets: the document of each token, int64 [b, s/c].
        positions: how many tokens precede each in its document, int64 [b, s/c].
        placement: how the samples lie over the context-parallel ranks.
    """
    number = len(ratios)
    # Sorted in ascending order: by document, then highest score first.  Tokens that may not be
    # selected are a document of their own, the last one.
    keys = (torch.where(valid, sets, number) << _KEY_BITS) | descending_keys(scores)
    if placement.shared:
        keys, positions = _of_all_ranks(torch.stack([keys, positions]), placement)
    keys = keys.flatten()
    if placement.shared:  # ties must lie in the order of their positions, which ranks interleave
        by_position = positions.flatten().argsort()
        order = by_position[keys[by_position].argsort(stable=True)]
    else:
        order = keys.argsort(stable=True)
    ranked = keys[order]
    document = ranked >> _KEY_BITS
    found = torch.zeros(number + 1, dtype=torch.int64, device=keys.device)
    found.index_add_(0, document, torch.ones_like(document))
    first = found.cumsum(0) - found
    count = round_half_up(in_units(ratios, keys.device), found[:-1])
    fits = torch.nn.functional.pad(count, (0, 1))  # none of those that may not be selected
    rank = torch.arange(len(keys), device=keys.device) - first[document]
    selected = torch.empty_like(keys, dtype=torch.bool)
    selected[order] = rank < fits[document]
    last = ranked[(first[:-1] + count - 1).clamp(min=0)]
    threshold = score_of_key(last & ((1 << _KEY_BITS) - 1))
    mine = selected.view(-1, *scores.shape)[placement.cp_rank if placement.shared else 0]
    return Selection(mine, threshold, found[:-1], count)


def _of_all_ranks(values: Tensor, placement: Placement) -> Tensor:
    """Gather [f, b, s/c] of all context-parallel ranks; return [f, c, b, s/c]."""
    of_ranks = [torch.empty_like(values) for _ in range(placement.cp_size)]
    torch.distributed.all_gather(of_ranks, values, group=placement.group)
    return torch.stack(of_ranks, dim=1)
