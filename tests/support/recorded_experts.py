"""recorded_pretrain.py, and of a policy's routers and of its layers that predict more tokens: the
gradients of each step, and what passes that are not training changed, in recorded/experts*.pt."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

import recorded_pretrain
from megatron_slm import pretrain
from watched_pretrain import generators


def train_recorded(args: Namespace) -> None:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import training

    from megatron_slm.reference.online import OnlineReference
    from megatron_slm.training import step

    routers: list[TopKRouter] = []
    seen: dict[str, Any] = {
        "gradients": [],
        "further": [],
        "passes": [],
        "moved": [],
        "counted": 0.0,
    }
    construct, finalize = TopKRouter.__init__, training.finalize_model_grads

    def construct_noted(self: TopKRouter, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        routers.append(self)

    def finalize_recorded(model: Any, *rest: Any, **named: Any) -> None:
        counts = [r.local_tokens_per_expert for r in routers if r.enable_expert_bias]
        seen["counted"] += sum(float(each.sum()) for each in counts)
        finalize(model, *rest, **named)
        own = {
            r.layer_number: r.weight.main_grad.clone() for r in routers if r.weight.requires_grad
        }
        seen["gradients"].append(own)
        seen["further"].append(
            {
                name[name.index("mtp.") :]: weight.main_grad.clone()
                for chunk in model
                for name, weight in chunk.named_parameters()
                if "mtp." in name
            }
        )

    def state() -> dict[str, Any]:
        buffers = {
            f"{number} {name}": buffer.tolist()
            for number, router in enumerate(routers)
            for name, buffer in router.named_buffers()
        }
        metrics = get_moe_metrics_tracker().metrics
        return (
            buffers
            | generators()
            | {name: entry.values.tolist() for name, entry in metrics.items()}
            | {"training": [r.training for r in routers if r.weight.requires_grad]}
        )

    def watched(run: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(run)
        def run_watched(*args: Any, **kwargs: Any) -> Any:
            before = state()
            result = run(*args, **kwargs)
            after = state()
            seen["passes"].append(name)
            seen["moved"] += [f"{name}: {key}" for key in after if after[key] != before[key]]
            return result

        return run_watched

    TopKRouter.__init__ = construct_noted
    training.finalize_model_grads = finalize_recorded
    step.score_with_policy = watched(step.score_with_policy, "policy")
    OnlineReference.score = watched(OnlineReference.score, "reference")
    training.evaluate = watched(training.evaluate, "validation")
    recorded_pretrain.train_recorded(args)
    torch.save(seen, f"recorded/experts{args.rank}.pt")


def train() -> None:
    pretrain._pretrain = train_recorded
    pretrain.train()
