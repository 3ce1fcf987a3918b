"""GPT pretraining with Megatron 0.19, in the manner of its pretrain_gpt.py."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


def get_batch(data_iterator, vp_stage):
    """Read a micro-batch, for every tensor- and context-parallel rank its part."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return None, None, None, None
    args = get_args()
    fields = ("tokens", "position_ids", "labels", "loss_mask")
    rank = mpu.get_tensor_model_parallel_rank()
    sample = next(data_iterator) if rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        {name: sample[name].cuda(non_blocking=True) for name in fields if rank == 0},
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    group = mpu.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return tuple(batch[name] for name in fields)


def loss_func(loss_mask, output):
    """Return the sum of a micro-batch's losses, their number, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(data_iterator, model):
    """Pass a micro-batch through the model."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, position_ids, labels, loss_mask = get_batch(data_iterator, vp_stage)
    output = model(tokens, position_ids, None, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def is_dataset_built_on_rank(vp_stage):
    """Tell whether this rank reads samples."""
    first = mpu.get_tensor_model_parallel_rank() == 0
    return first and is_first_or_last_pipeline_stage(vp_stage)


def train_valid_test_datasets_provider(num_samples, vp_stage=None):
    """Build datasets of these numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        GPTDataset, num_samples, partial(is_dataset_built_on_rank, vp_stage), config
    ).build()


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
