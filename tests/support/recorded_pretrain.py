"""megatron_slm.pretrain, and what every training micro-batch selected, in recorded/rank*.pt."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_slm import pretrain

train = pretrain._pretrain


def train_recorded(args: Namespace) -> None:
    from megatron.core import mpu

    from megatron_slm.training.objective import MicroBatchObjective

    records: list[dict[str, Any]] = []
    weigh = MicroBatchObjective.weigh

    def weigh_recorded(
        self: MicroBatchObjective, *known: torch.Tensor, **named: torch.Tensor
    ) -> torch.Tensor:
        weights = weigh(self, *known, **named)
        if self.step.training:
            records.append(
                {
                    "iteration": self.step.iteration,
                    "number": self.micro_batch.number,
                    "selected": weights.clone() if self.choice is None else self.choice.selected,
                    "weights": weights.clone(),
                    "scores": self.micro_batch.scores,
                    "domains": self.micro_batch.domains,
                    "reference": self.micro_batch.reference_losses,
                }
            )
        return weights

    MicroBatchObjective.weigh = weigh_recorded
    train(args)
    Path("recorded").mkdir(exist_ok=True)
    where = {
        "tp": mpu.get_tensor_model_parallel_rank(),
        "dp": mpu.get_data_parallel_rank(),
        "cp": mpu.get_context_parallel_rank(),
        "dp_size": mpu.get_data_parallel_world_size(),
        "cp_size": mpu.get_context_parallel_world_size(),
        "last_stage": mpu.is_pipeline_last_stage(),
    }
    torch.save({"where": where, "records": records}, f"recorded/rank{args.rank}.pt")


if __name__ == "__main__":
    pretrain._pretrain = train_recorded
    pretrain.main()
