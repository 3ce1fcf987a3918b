"""Leave tokens out by a hash of what precedes them, so that no passage can be learnt by heart.

Goldfish loss (Hans et al., arXiv 2406.10209; also Apertus, arXiv 2509.14233), in the form
`hash-table` of Hans et al.'s code.  The mask is a function of the labels alone: a passage that
appears again is masked in the same places.  As in that code, the window that is hashed ends
with the label itself, whereas the paper speaks of the h tokens before it; and a sample's first
h - 1 labels are kept.  So are those of each document if documents do not see each other; if they
do, they share windows where they meet.

The hash is a product modulo the table's size, as in that code, but of the odd numbers 2 id + 1 and
not of the ids.  A product of ids is 0 in int64 where one id is 0, which the end of a document is in
many tokenizers, or where they have 64 factors of 2, as a tenth of all windows of 50 do.  All such
tokens would have one fate; to be left out, it would be, for this table and k up to 4.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_TABLE_SIZE = 1_000_003
_SEED = 2971215073


def kept_by_goldfish(
    labels: Tensor, one_in: int, width: int, places: Tensor | None = None
) -> Tensor:
    """Return which tokens keep their loss, bool [b, s]: all but about one in `one_in`.

    Args:
        labels: the labels of whole samples, int64 [b, s].
        one_in: k of the paper.
        width: h of the paper, at most s.
        places: the position in its document of the token that each is predicted from, int64 [b, s];
            None if documents see each other.
    """
    odd = 2 * labels + 1
    products = odd.unfold(1, width, 1).prod(dim=-1)  # int64, which wraps around
    kept = torch.ones_like(labels, dtype=torch.bool)
    kept[:, width - 1 :] = _table(labels.device)[products % _TABLE_SIZE] >= 1 / one_in
    return kept if places is None else kept | (places < width - 1)


@lru_cache(maxsize=4)
def _table(device: torch.device) -> Tensor:
    """Draw the table, which is the same on all devices; the authors draw theirs on the GPU."""
    return torch.rand(_TABLE_SIZE, generator=torch.Generator().manual_seed(_SEED)).to(device)
