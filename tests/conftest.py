"""What distributed tests share, made once a session."""

from __future__ import annotations

import pytest
import torch

from gpt_datasets import gpt_config
from jobs import (
    GLOBAL_BATCH,
    SEQUENCE,
    SPLIT,
    STEPS,
    VOCABULARY,
    Checkpoints,
    Corpus,
    train_checkpoints,
    write_dataset,
)
from real_text import docstrings


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("corpus") / "docstrings"
    write_dataset(prefix, docstrings(["argparse", "difflib", "statistics"]))
    return Corpus(prefix)


@pytest.fixture(scope="session")
def samples(corpus: Corpus) -> dict[str, torch.Tensor]:
    """The training samples in the order a run reads them, by Megatron's own dataset: tokens,
    labels, loss_mask [N, s]."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    count = STEPS * GLOBAL_BATCH
    config = gpt_config(
        SEQUENCE,
        VOCABULARY,
        blend=([str(corpus.prefix)], None),
        split=SPLIT,
        eod_mask_loss=True,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [count, GLOBAL_BATCH, 0], lambda: True, config
    ).build()
    rows = [train[i] for i in range(count)]
    return {
        name: torch.stack([torch.as_tensor(row[name]) for row in rows])
        for name in ("tokens", "labels", "loss_mask")
    }


@pytest.fixture(scope="session")
def untied(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return train_checkpoints(corpus, tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return train_checkpoints(corpus, tmp_path_factory.mktemp("tied"), tied=True)
