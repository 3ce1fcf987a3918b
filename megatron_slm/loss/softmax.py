"""Add a chunk of logits to the softmax of its rows, and compute its gradient, in plain torch.

softmax_triton.py has the same two functions as Triton kernels; chunked.py uses these where Triton
does not work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_chunk(sums: Tensor, maximum: Tensor, logits: Tensor, labels: Tensor, first: int) -> Tensor:
    """Add a chunk's logits to the sums of its rows, and return the maximum with them.

    Args:
        sums: changed in place, float32 [2 or 3, n]: the label's logit, the sum of e^x with
            x = logit - maximum, and, if entropies are wanted, the sum of x e^x.
        maximum: maximum of the logits so far, float32 [n]; may be overwritten.
        logits: the chunk, [n, columns], of any float type; may be overwritten.
        labels: the tokens to predict, int64 [n].
        first: the chunk's first column, counted in the whole vocabulary as labels are.
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
    """Replace logits by their gradient, scale (softmax - one-hot), [k, columns].

    Args:
        logits: the chunk, [k, columns], of any float type.
        labels: the tokens to predict, int64 [k].
        first: as in add_chunk.
        maximum: maximum of each row's logits over the whole vocabulary, float32 [k].
        sum_exp: each row's sum of e^(logit - maximum) over the whole vocabulary, float32 [k].
        scale: the derivative of the result by each row's loss, float32 [k].
    """
    column, here = _inside(labels - first, logits.shape[1])
    gradient = logits.float().sub_(maximum[:, None]).exp_().mul_((scale / sum_exp)[:, None])
    gradient.scatter_add_(-1, column[:, None], torch.where(here, -scale, 0.0)[:, None])
    return gradient if gradient is logits else logits.copy_(gradient)


def raise_maximum(old: Tensor, new: Tensor, sums: Tensor) -> Tensor:
    """Rescale sums in place from the maximum `old` to the maximum `new`, [n]; return `new`."""
    down = old - new
    if sums.shape[0] == 3:
        sums[2] += down * sums[1]
    sums[1:] *= torch.exp(down)
    return new


def _inside(column: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return each column, or 0 where it is not in [0, columns), and whether it is in there."""
    here = (column >= 0) & (column < columns)
    return torch.where(here, column, 0), here
