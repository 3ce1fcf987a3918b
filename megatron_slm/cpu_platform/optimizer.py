"""Adam with the state layout of Apex's FusedAdam, computed by torch.

torch's AdamW keeps `step` as a tensor beside each parameter's moments; FusedAdam keeps one integer
in the parameter group.  Megatron's distributed optimizer can reload only the latter: of the former
it asks the loaded state for a tensor that it never saved, so that checkpoints with torch's AdamW
are saved but cannot be resumed.  This class closes that gap, and gives CPU and GPU checkpoints the
same format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """Decoupled (AdamW) or L2-regularised Adam, with the arguments of apex.optimizers.FusedAdam."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True: CUDA graphs of the optimizer need a GPU")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            gradients = [p.grad for p in params]
            if not self.adam_w_mode and group["weight_decay"]:
                gradients = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
            beta1, beta2 = group["betas"]
            adamw(
                params,
                gradients,
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # adamw() advances each step count before it uses it.
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"] if self.adam_w_mode else 0.0,
                eps=group["eps"],
                maximize=False,
            )
        return loss


def install() -> None:
    """Give Megatron's optimizers this class where they look for Apex's."""
    import megatron.core.optimizer as core_optimizer
    from megatron.core.optimizer import distrib_optimizer

    core_optimizer.Adam = FusedAdam
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True

    # Loading copies into the parameters themselves if they are float32, which autograd forbids.
    # Megatron disables gradients for its other formats only; on a GPU few train in float32.
    optimizer = distrib_optimizer.DistributedOptimizer
    optimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(
        optimizer.load_parameter_state_from_dp_reshardable
    )
