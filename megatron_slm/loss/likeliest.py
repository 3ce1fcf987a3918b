"""Find the entropy among each row's likeliest tokens, as logits pass by in chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

LIKELIEST = 20


class LikeliestTokens:
    """The LIKELIEST highest logits of each row so far, of this rank's part of the vocabulary."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.logits = torch.empty(rows, 0, dtype=torch.float32, device=device)

    def add(self, logits: Tensor) -> None:
        """Take a chunk of logits, [n, columns], of any float type; it is not changed."""
        self.logits = _highest(torch.cat([self.logits, _highest(logits).float()], 1))

    def entropies(self, group: ProcessGroup) -> Tensor:
        """Compute the entropies of their softmax, in nats, float32 [n].

        Collective over the tensor-parallel ranks: one all-gather of [n, LIKELIEST].  Each of the
        tokens that are likeliest of all is among the likeliest of its rank.
        """
        logits = self.logits
        if group.size() > 1:
            # A rank may have fewer columns, or nothing but padding.
            missing = LIKELIEST - logits.shape[1]
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
            of_ranks = [torch.empty_like(logits) for _ in range(group.size())]
            torch.distributed.all_gather(of_ranks, logits, group=group)
            logits = _highest(torch.cat(of_ranks, 1))
        return torch.special.entr(logits.softmax(-1)).sum(-1)


def _highest(logits: Tensor) -> Tensor:
    """Return the LIKELIEST highest logits of each row, or all if there are fewer, in any order."""
    return logits.topk(min(LIKELIEST, logits.shape[1]), dim=1, sorted=False).values
