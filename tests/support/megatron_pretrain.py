"""Megatron's own GPT pretraining: its forward step and loss, nothing of selective language
modeling but the CPU platform and the layers that stand in for Transformer Engine's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from megatron_slm import cpu_platform

cpu_platform.install()

from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.utils import (
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args

from megatron_slm.model.layer_spec import plain_block_spec
from megatron_slm.training import datasets


def loss_function(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    losses = output.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    report = torch.cat([loss.clone().detach().view(1), tokens.view(1)])
    return loss, tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
    args = get_args()
    rank = mpu.get_tensor_model_parallel_rank()
    batch = next(data_iterator) if rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
    )
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])


if __name__ == "__main__":

    def defaults(parser: Any) -> Any:
        parser.set_defaults(
            **cpu_platform.ARGUMENT_DEFAULTS,
            calculate_per_token_loss=True,
            create_attention_mask_in_dataloader=False,
            no_persist_layer_norm=True,
        )
        return parser

    arguments = parse_and_validate_args(extra_args_provider=defaults)
    datasets.use_prebuilt_helpers()
    model_config = gpt_config_from_args(arguments)
    model_config.transformer_layer_spec = plain_block_spec
    pretrain(
        pretrain_cfg_container_from_args(arguments, model_config),
        datasets.DatasetProvider(),
        ModelType.encoder_or_decoder,
        forward_step,
    )
