"""Check and build a run's datasets: Megatron's own, as in pretrain_gpt.py, or a script's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from megatron_slm.data.indices import building_indices
from megatron_slm.data.score_cache import Section
from megatron_slm.data.scored_dataset import SampleScored, document_scored
from megatron_slm.errors import UserError
from megatron_slm.model.documents import packs_documents
from megatron_slm.training.batch_schedule import check_batch_sizes, length_of_training
from megatron_slm.training.caches import SPLITS, Caches, data_prefixes
from megatron_slm.training.data_parts import check_parts


def check_files(args: Any, draws: bool = True) -> None:
    """Check every dataset's files before anything is built.

    Every rank checks them, so that none waits for another that has exited.  Files in object storage
    and conversations are left to Megatron.

    Args:
        args: the arguments after Megatron's validation.
        draws: whether a run's samples are drawn from the datasets.

    Raises:
        UserError: files are missing or truncated, do not belong together, or were made with a
            larger vocabulary or another tokenizer; or a part of a dataset lacks what is drawn.
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


def check_named(args: Any) -> None:
    """Check that the arguments name data, which a script without datasets of its own needs.

    Raises:
        UserError: they name none.
    """
    if not args.mock_data and get_blend_and_blend_per_split(args) == (None, None):
        raise UserError(
            "there is no data: give --data-path, or --train-data-path for its parts; a script that "
            "builds datasets of its own calls SelectiveTraining(args, its_provider)"
        )


class DatasetProvider:
    """Megatron's `train_valid_test_dataset_provider`: builds datasets, and adds cached losses."""

    # Every rank calls the provider; it decides by itself which of them build.
    is_distributed = True

    def __init__(
        self,
        caches: Caches | None = None,
        build: Callable[..., Any] | None = None,
        values: Mapping[str, dict[str, Section]] | None = None,
    ) -> None:
        """Make a provider, which builds nothing until it is called.

        Args:
            caches: where samples get their reference losses from; None if they need none.
            build: a provider that builds datasets of the script's own; None for those of
                Megatron's pretrain_gpt.py.
            values: the sections of other values of tokens, by the field of a sample that they
                fill and the dataset's name.

        Raises:
            UserError: losses or values are stored by document, and the datasets are the script's.
        """
        if build is not None and caches is not None and caches.kind == "document":
            raise UserError(
                "--slm-reference-cache: losses stored by document are for Megatron's own GPT "
                "datasets, and this script has its own: score --by sample"
            )
        if build is not None and values:
            raise UserError(
                "--slm-token-values: values are for Megatron's own GPT datasets, and this script "
                "has its own"
            )
        self.caches, self.values = caches, dict(values or {})
        self.build = build or self._build
        self.built: list[Any] = [None] * len(SPLITS)  # the datasets, once they are built

    def __call__(self, samples: list[int | None], vp_stage: int | None = None) -> Any:
        """Build the training, validation and test datasets; None each on ranks that read no data.

        Args:
            samples: how many samples of each are drawn.
            vp_stage: the model chunk that they are for.
        """
        args = get_args()
        if args.step_batch_size_schedule is not None:
            check_batch_sizes(args)
            samples = [max(samples[0] or 0, length_of_training(args)[1]), *samples[1:]]
        datasets = list(self.build(samples, vp_stage=vp_stage))
        sections = self._by_sample
        if self.caches is not None and sections is not None:
            # A split that a run draws nothing from has no section; all stages leave it out.
            datasets = [
                dataset if split in sections else None
                for split, dataset in zip(SPLITS, datasets, strict=True)
            ]
            if mpu.is_pipeline_last_stage():
                self.caches.check_samples(datasets, samples)
                datasets = [
                    None if dataset is None else SampleScored(dataset, sections[split])
                    for split, dataset in zip(SPLITS, datasets, strict=True)
                ]
        train, valid, test = datasets
        sets = valid if isinstance(valid, list) else [valid]  # --multiple-validation-sets
        if any(dataset is not None for dataset in (train, *sets, test)):
            self.built = datasets  # one call for each model chunk
        return datasets

    def available(self, split: str, dataset: Any) -> int:
        """Return how many samples there are of a dataset: those that are scored, with a cache."""
        if dataset is None:
            return 0
        return len(dataset if self._by_sample is None else self._by_sample[split])

    @property
    def _by_sample(self) -> dict[str, Section] | None:
        """The sections of a cache by sample, by split; None without such a cache."""
        by_sample = self.caches is not None and self.caches.kind == "sample"
        return self.caches.sections if self.caches is not None and by_sample else None

    def _scored(self) -> type[GPTDataset] | None:
        """Return the class of a dataset with what is stored by document; None if nothing is, or if
        this pipeline stage does not read it."""
        by_document = self.caches is not None and self.caches.kind == "document"
        losses = self.caches.sections if self.caches is not None and by_document else None
        if not mpu.is_pipeline_last_stage() or (losses is None and not self.values):
            return None
        return document_scored(losses, **self.values)

    def _build(self, samples: list[int | None], vp_stage: int | None = None) -> list[Any]:
        """Build datasets as pretrain_gpt.py does; if losses are stored by document, with these."""
        args = get_args()
        print_rank_0("> building train, validation, and test datasets for GPT ...")
        kind: Any = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
        kind = self._scored() or kind
        builder = BlendedMegatronDatasetBuilder(
            kind, samples, partial(reads_data, vp_stage), _dataset_config(args)
        )
        datasets = _built(builder)
        print_rank_0("> finished creating GPT datasets ...")
        return datasets


def reads_data(vp_stage: int | None = None) -> bool:
    """Return whether this rank, or the model chunk `vp_stage` on it, reads samples."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    if is_first_or_last_pipeline_stage(vp_stage):
        return True
    # A stage between has to know where documents end.
    between = not is_first_or_last_pipeline_stage(None)
    last_chunk = mpu.get_virtual_pipeline_model_parallel_world_size()
    own = vp_stage is None or vp_stage + 1 == last_chunk
    return packs_documents(get_args()) and between and own


def _built(builder: BlendedMegatronDatasetBuilder) -> list[Any]:
    """Build datasets, and leave out those without samples, from which nothing is drawn.

    Megatron would make a loader of an empty dataset, and refuse it.

    Raises:
        UserError: their indices cannot be written, or one that is there is damaged.
    """
    remedy = (
        "name a directory to which the datasets' indices can be written, with --data-cache-path"
    )
    with building_indices(remedy):
        datasets = builder.build()
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
        inter_document_masking=args.dataloader_inter_document_masking,
    )
