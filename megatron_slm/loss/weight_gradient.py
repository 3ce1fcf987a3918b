"""Compute the products of the chunked head's backward, and add them where they belong."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """The gradient dW = dlogits^T h of the output weight, computed a chunk of rows at a time."""

    def __init__(self, weight: Tensor, accumulate_into_main_grad: bool) -> None:
        """Allocate the gradient if it needs a tensor of its own.

        Args:
            weight: the output weight, [v/t, h].
            accumulate_into_main_grad: add to weight.main_grad, as Megatron's fused linear does.
        """
        self.weight = weight
        self.fused = accumulate_into_main_grad and weight.requires_grad
        needs_own = weight.requires_grad and not self.fused
        self.gradient = torch.empty_like(weight) if needs_own else None

    def set(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Compute the rows of dW that belong to a chunk of columns.

        Args:
            columns: the chunk.
            gradient: the gradient of its logits, [k, columns].
            hidden: the hidden states, [k, h].
        """
        if self.fused:
            add_product(self.weight.main_grad[columns], gradient.t(), hidden)
        elif self.gradient is not None:
            torch.mm(gradient.t(), hidden, out=self.gradient[columns])

    def result(self) -> Tensor | None:
        """Return what the backward is to give autograd as the weight's gradient."""
        # With fusion, the same as Megatron's fused linear returns: a tensor that makes the DDP hook
        # run, but that the hook does not add, or a zero that it adds if the weight is tied.
        if not self.fused:
            return self.gradient
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to `total`, in its dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        # The product's kernel adds its float32 sums to `total` without rounding them first.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # torch has `out_dtype` for CUDA only
        total.add_(left @ right)
