"""What a chunk of logits adds to a row's softmax, and its gradient, in plain torch.

softmax_triton.py has the same two functions as kernels; chunked.py takes these where it cannot have
those.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_chunk(sums: Tensor, maximum: Tensor, logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Add a chunk's logits, which may be overwritten, to sums; returns the maximum with them.

    Args:
        sums: float32 [2 or 3, n], changed in place: target logit, sum of e^x with
            x = logit - maximum, and with entropies sum of x e^x.
        maximum: float32 [n], may be overwritten.
        logits: [n, columns], of any float type.
        labels: int64 [n].
        first: number of the chunk's first column in the vocabulary that labels count.
    """
    column, here = _inside(labels - first, logits.shape[1])
    logits = logits.float()
    sums[0] += torch.where(here, logits.gather(-1, column[:, None]).squeeze(-1), 0.0)
    maximum = raise_maximum(maximum, torch.maximum(maximum, logits.amax(-1)), sums)
    shifted = logits.sub_(maximum[:, None])
    if sums.shape[0] == 2:
        sums[1] += shifted.exp_().sum(-1)
    else:
        exp = shifted.exp()
        sums[1] += exp.sum(-1)
        sums[2] += exp.mul_(shifted).sum(-1)
    return maximum


def logits_gradient(
    logits: Tensor, labels: Tensor, first: int, maximum: Tensor, sum_exp: Tensor, scale: Tensor
) -> Tensor:
    """Replace logits by scale (softmax - one-hot), [k, columns].

    Args:
        logits: [k, columns], of any float type.
        labels: int64 [k], first: as in add_chunk.
        maximum, sum_exp: float32 [k], of the rows' softmax over the whole vocabulary.
        scale: float32 [k], derivative by each row's loss.
    """
    column, here = _inside(labels - first, logits.shape[1])
    gradient = logits.float().sub_(maximum[:, None]).exp_().mul_((scale / sum_exp)[:, None])
    gradient.scatter_add_(-1, column[:, None], torch.where(here, -scale, 0.0)[:, None])
    return gradient if gradient is logits else logits.copy_(gradient)


def raise_maximum(old: Tensor, new: Tensor, sums: Tensor) -> Tensor:
    """Bring sums, in place, from the maximum `old` to `new`, [n]; returns new."""
    down = old - new
    if sums.shape[0] == 3:
        sums[2] += down * sums[1]
    sums[1:] *= torch.exp(down)
    return new


def _inside(column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """column, 0 where it is outside of [0, columns), and whether it is inside."""
    here = (column >= 0) & (column < columns)
    return torch.where(here, column, 0), here
