"""Products of the chunked head's backward, added where they belong."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightGradient:
    """dW = dlogits^T h, a chunk of its rows at a time: in the weight's gradient or main_grad.

    Args:
        weight: [v/t, h].
        accumulate_into_main_grad: add to weight.main_grad, as Megatron's fused linear does.
    """

    def __init__(self, weight: Tensor, accumulate_into_main_grad: bool) -> None:
        self.weight = weight
        self.fused = accumulate_into_main_grad and weight.requires_grad
        needs_own = weight.requires_grad and not self.fused
        self.gradient = torch.empty_like(weight) if needs_own else None

    def set(self, columns: slice, gradient: Tensor, hidden: Tensor) -> None:
        """Take the gradient of a chunk's logits, [k, columns], and the hidden states, [k, h]."""
        if self.fused:
            add_product(self.weight.main_grad[columns], gradient.t(), hidden)
        elif self.gradient is not None:
            torch.mm(gradient.t(), hidden, out=self.gradient[columns])

    def result(self) -> Tensor | None:
        """Return what autograd is to take for the weight's gradient."""
        # As in Megatron's fused linear: the DDP hook must run, and must not add this tensor, unless
        # the weight is tied and the hook expects a zero to add.
        if not self.fused:
            return self.gradient
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right to total, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        # The product's float32 sums go into total as they are, by the product's own kernel.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # which torch has for CUDA alone
        total.add_(left @ right)
