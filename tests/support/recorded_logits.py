"""megatron_slm.pretrain, and what its output layer computed in training, in logits/rank*.pt."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_slm import pretrain

train = pretrain._pretrain


def train_recorded(args: Namespace) -> None:
    from megatron.core.models.gpt import GPTModel

    steps: dict[str, list[torch.Tensor]] = {"tokens": [], "labels": [], "logits": []}
    forward = GPTModel.forward

    def forward_recorded(self: GPTModel, input_ids: torch.Tensor, *more: Any, **rest: Any) -> Any:
        if self.training and self.pre_process:
            steps["tokens"].append(input_ids.clone())
        if not (self.training and self.post_process):
            return forward(self, input_ids, *more, **rest)

        def record(module: Any, inputs: Any, output: Any) -> None:
            steps["labels"].append(rest["labels"].clone())
            steps["logits"].append(output[0].detach().transpose(0, 1).clone())  # [b, s, v/t]

        handle = self.output_layer.register_forward_hook(record)
        try:
            return forward(self, input_ids, *more, **rest)
        finally:
            handle.remove()

    GPTModel.forward = forward_recorded
    train(args)
    Path("logits").mkdir(exist_ok=True)
    torch.save(steps, f"logits/rank{args.rank}.pt")


if __name__ == "__main__":
    pretrain._pretrain = train_recorded
    pretrain.main()
