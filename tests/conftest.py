"""What distributed tests share, made once a session."""

from __future__ import annotations

import signal

import pytest
import torch

from gpt_datasets import samples_of
from jobs import (
    Checkpoints,
    Corpus,
    train_checkpoints,
    write_dataset,
)
from real_text import docstrings

# A shell ignores Ctrl-C for what it runs in the background, and every process started from there
# inherits that; the tests interrupt processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("corpus") / "docstrings"
    write_dataset(prefix, docstrings(["argparse", "difflib", "statistics"]))
    return Corpus(prefix)


@pytest.fixture(scope="session")
def both_samples(corpus: Corpus) -> list[dict[str, torch.Tensor]]:
    """Training and validation samples in the order a run reads them."""
    return samples_of(corpus)


@pytest.fixture(scope="session")
def samples(both_samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of training."""
    return both_samples[0]


@pytest.fixture(scope="session")
def validation(both_samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of validation."""
    return both_samples[1]


@pytest.fixture(scope="session")
def untied(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return train_checkpoints(corpus, tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def tied(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return train_checkpoints(corpus, tmp_path_factory.mktemp("tied"), tied=True)
