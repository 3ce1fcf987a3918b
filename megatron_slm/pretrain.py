"""Pretrain with Selective Language Modeling: torchrun ... -m megatron_slm.pretrain [arguments]

Takes all arguments of Megatron's GPT pretraining, and the group "selective language modeling".
With --slm-token-ratio 1 and without a reference, it is causal language modeling, by which reference
models are trained.  --help lists that group, and --help-megatron all arguments.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_slm.entry import start
from megatron_slm.training.command_line.first_check import TRAINING


def main() -> None:
    """Check the command line, and train."""
    start(TRAINING, train)


def train() -> None:
    """Train.  Without a GPU, the CPU platform must be installed already."""
    from megatron_slm.selective import add_slm_arguments
    from megatron_slm.training.command_line.parsing import parse_training

    _pretrain(parse_training(add_slm_arguments))


def _pretrain(args: Namespace) -> None:
    # Without a GPU, the platform has to be installed before Megatron is imported.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_slm.selective import SelectiveTraining

    slm = SelectiveTraining(args)
    slm.install()
    with slm.errors_in_one_line():
        pretrain(
            pretrain_cfg_container_from_args(args, slm.model_config()),
            slm.datasets,
            ModelType.encoder_or_decoder,
            slm.forward_step,
        )


if __name__ == "__main__":
    main()
