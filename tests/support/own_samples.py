"""A script whose data --data-path does not name, and whose samples have types of their own."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from megatron_slm import SelectiveTraining, add_slm_arguments, use_device

use_device()

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_slm.training.datasets import DatasetProvider

Samples = torch.utils.data.Dataset[dict[str, torch.Tensor]]


class Narrow(Samples):
    """The samples of a dataset of Megatron's, with types as small as they may be."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {name: value.to(torch.int32) for name, value in self.dataset[index].items()}
        mask = sample["loss_mask"].bool()
        labels = sample["labels"].masked_fill(~mask, -100)
        return sample | {"labels": labels, "loss_mask": mask, "source": torch.tensor(7)}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    parser.add_argument("--own-data", nargs="+")
    return add_slm_arguments(parser)


def provide(samples: list[int | None], vp_stage: int | None = None) -> list[Samples | None]:
    args = get_args()
    args.data_path = args.own_data
    built = DatasetProvider()(samples, vp_stage)
    return [None if dataset is None else Narrow(dataset) for dataset in built]


if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    slm = SelectiveTraining(args, provide)
    slm.install()
    pretrain(
        pretrain_cfg_container_from_args(args, slm.model_config()),
        slm.datasets,
        ModelType.encoder_or_decoder,
        slm.forward_step,
    )
