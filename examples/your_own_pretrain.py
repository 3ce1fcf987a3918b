"""GPT pretraining with Megatron 0.19 and selective language modeling, in a script of your own."""

from functools import partial

from megatron_slm import use_device

use_device()  # on the CPU where there is no GPU; has to come before Megatron is imported

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_slm import SelectiveTraining, add_slm_arguments


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
    args = parse_and_validate_args(
        extra_args_provider=add_slm_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    slm = SelectiveTraining(args, train_valid_test_datasets_provider)
    slm.install()
    pretrain(
        pretrain_cfg_container_from_args(args, slm.model_config()),
        slm.datasets,
        ModelType.encoder_or_decoder,
        slm.forward_step,
    )
