"""Megatron's own GPT datasets of token ids, as tests and benchmarks read them."""

from __future__ import annotations

from typing import Any

import torch

from jobs import GLOBAL_BATCH, SEQUENCE, SPLIT, STEPS, VOCABULARY, Corpus


def gpt_config(sequence_length: int, vocabulary: int, **more: Any) -> Any:
    """Make a GPTDatasetConfig; `more` takes precedence over what all tests share."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    common: dict[str, Any] = {
        "random_seed": 1234,
        "split": "1,0,0",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "mid_level_dataset_surplus": 0.005,
    }
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=vocabulary
    )
    return GPTDatasetConfig(sequence_length=sequence_length, tokenizer=tokenizer, **(common | more))


def samples_of(corpus: Corpus) -> list[dict[str, torch.Tensor]]:
    """Training and validation samples in the order a run reads them, by Megatron's own datasets:
    tokens, labels, loss_mask [N, s]."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    counts = [STEPS * GLOBAL_BATCH, GLOBAL_BATCH, 0]
    config = gpt_config(
        SEQUENCE,
        VOCABULARY,
        blend=([str(corpus.prefix)], None),
        split=SPLIT,
        eod_mask_loss=True,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, config).build()
    rows = [
        [dataset[i] for i in range(count)]
        for dataset, count in zip(built[:2], counts[:2], strict=True)
    ]
    return [
        {
            name: torch.stack([torch.as_tensor(row[name]) for row in of_split])
            for name in ("tokens", "labels", "loss_mask")
        }
        for of_split in rows
    ]
