"""Megatron's own GPT datasets of token ids, as tests and benchmarks read them."""

from __future__ import annotations

from typing import Any


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
