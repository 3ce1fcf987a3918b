"""Megatron's own GPT datasets, as pretrain_gpt.py builds them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_slm.data.dataset_check import TOKENIZER_KINDS, check_quickly
from megatron_slm.data.scored_dataset import SampleScored, document_scored
from megatron_slm.errors import UserError
from megatron_slm.training.caches import SPLITS, Caches, data_prefixes
from megatron_slm.training.data_parts import check_parts


def use_prebuilt_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers, as the wheel has them compiled and no
    Makefile to compile them by."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def check_files(args: Any, draws: bool = True) -> None:
    """Look at every dataset's files before anything is built.  Done on every rank, so that none
    waits for one that has ended.  Files in object storage, and conversations, are left to Megatron.

    Args:
        draws: whether the samples of a run are drawn from them.

    Raises:
        UserError: files are missing or truncated, do not belong together, or were made with a
            larger vocabulary or another tokenizer; or a part of them has not what is drawn.
    """
    if args.sft:
        return
    reads_file = args.tokenizer_type in TOKENIZER_KINDS
    model = args.tokenizer_model if reads_file else None
    indices = {}
    for prefix in data_prefixes(args):
        if not is_object_storage_path(prefix):
            found = check_quickly(prefix, args.slm_vocab_size, tokenizer_model=model)
            indices[prefix] = found.index
    if draws:
        check_parts(args, indices)


class DatasetProvider:
    """Megatron's `train_valid_test_dataset_provider`.

    Args:
        caches: where samples get their reference losses from; None where they need none.
    """

    # Every rank calls the provider; it decides by itself which of them build.
    is_distributed = True

    def __init__(self, caches: Caches | None = None) -> None:
        self.caches = caches
        self.built: list[Any] = [None] * len(SPLITS)  # the datasets, when they are

    def __call__(self, samples: list[int | None], vp_stage: int | None = None) -> Any:
        """Training, validation and test datasets of `samples` samples each; None on ranks that read
        no data."""
        args = get_args()
        caches = self.caches if mpu.is_pipeline_last_stage() else None
        print_rank_0("> building train, validation, and test datasets for GPT ...")
        kind: Any = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
        if caches is not None and caches.kind == "document":
            kind = document_scored(caches.sections)
        builder = BlendedMegatronDatasetBuilder(
            kind, samples, partial(reads_data, vp_stage), _dataset_config(args)
        )
        datasets = _built(builder)
        print_rank_0("> finished creating GPT datasets ...")
        if caches is not None and caches.kind == "sample":
            caches.check_samples(datasets, samples)
            # A split that a run draws nothing from has no section.
            datasets = [
                SampleScored(dataset, caches.sections[split])
                if dataset is not None and split in caches.sections
                else None
                for split, dataset in zip(SPLITS, datasets, strict=True)
            ]
        if any(dataset is not None for dataset in datasets):  # one call for each model chunk
            self.built = datasets
        return datasets


def reads_data(vp_stage: int | None = None) -> bool:
    """Whether this rank reads samples."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


def _built(builder: BlendedMegatronDatasetBuilder) -> list[Any]:
    """Build, without the datasets that have no samples: of those, which nothing is drawn from,
    Megatron would make a loader and refuse it."""
    try:
        datasets = builder.build()
    except Exception as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{cause.filename}: {cause.strerror}: name a directory where the datasets' indices can "
            "be written with --data-cache-path"
        ) from error
    return [None if dataset is not None and len(dataset) == 0 else dataset for dataset in datasets]


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    per_dataset = args.per_dataset_sequences_path
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=json.loads(Path(per_dataset).read_text()) if per_dataset else None,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
