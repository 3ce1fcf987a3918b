"""megatron_slm.pretrain, watching what its reference touches; written to watched<rank>.pt."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy
import torch

from megatron_slm import pretrain

train = pretrain._pretrain


def generators() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_slm.cpu_platform import rng

    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": rng.cuda_generator.get_state().tolist(),
        "tracker": {k: v.tolist() for k, v in get_cuda_rng_tracker().get_states().items()},
        "python": random.getstate(),
        "numpy": [str(part) for part in numpy.random.get_state()],
    }


def checksum(model: torch.nn.Module) -> list[int]:
    return [int(p.detach().view(torch.int32).long().sum()) for p in model.parameters()]


def train_watched(args: Namespace) -> None:
    from megatron.training import training

    from megatron_slm.reference.online import OnlineReference
    from megatron_slm.training import sources

    seen: dict[str, Any] = {"scores": 0}
    build, score = sources.frozen_reference, OnlineReference.score
    setup = training.setup_model_and_optimizer

    def moved(before: dict[str, Any]) -> list[str]:
        return [name for name, state in generators().items() if state != before[name]]

    def build_watched(*args: Any) -> OnlineReference:
        before = generators()
        reference = build(*args)
        seen["generators moved by build"] = moved(before)
        seen["generators moved by score"] = []
        seen["weights before"] = checksum(reference.model)
        seen["reference"] = reference
        return reference

    def score_watched(self: OnlineReference, *args: Any, **kwargs: Any) -> Any:
        before = generators()
        result = score(self, *args, **kwargs)
        seen["generators moved by score"] += moved(before)
        seen["scores"] += 1
        return result

    def setup_watched(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        seen["model"], seen["optimizer"] = model, optimizer
        return model, optimizer, scheduler

    sources.frozen_reference = build_watched
    OnlineReference.score = score_watched
    training.setup_model_and_optimizer = setup_watched
    train(args)
    reference = seen.pop("reference").model
    model, optimizer = seen.pop("model"), seen.pop("optimizer")
    parameters = list(reference.parameters())
    seen |= {
        "parameters": len(parameters),
        "requiring gradient": sum(p.requires_grad for p in parameters),
        "with gradient": sum(p.grad is not None or hasattr(p, "main_grad") for p in parameters),
        "training mode": reference.training,
        "weights after": checksum(reference),
        # Two moments for each of the policy's parameters and for nothing else.
        "policy numbers": 2 * sum(p.numel() for chunk in model for p in chunk.parameters()),
        "optimizer numbers": sum(
            value.numel()
            for part in optimizer.chained_optimizers
            for state in part.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }
    torch.save(seen, f"watched{args.rank}.pt")


if __name__ == "__main__":
    pretrain._pretrain = train_watched
    pretrain.main()
