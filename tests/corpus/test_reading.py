"""Megatron's own readers, unmodified, give the ids that Hugging Face's tokenizer gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engines import hugging_face  # noqa: F401  (a fixture)
from transformers import PreTrainedTokenizerFast

from corpus import Document, preprocess, run_tool, texts, write_jsonl
from gpt_datasets import gpt_config

TEXTS = texts()
SEQUENCE = 64


@pytest.fixture
def dataset(tmp_path: Path, hugging_face: Path) -> tuple[Path, list[Document]]:  # noqa: F811
    """Two halves of a corpus in two shards each, and what they should hold."""
    reference: Any = PreTrainedTokenizerFast.from_pretrained(hugging_face)
    documents = []
    for name, found in {"first": TEXTS[::2], "second": TEXTS[1::2]}.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", found)
        options = ("--tokenizer-model", hugging_face, "--engine", "auto", "--append-eod")
        preprocess(source, tmp_path / name, *options, "--shard-size", "80K")
        documents += [
            (*reference.encode(text, add_special_tokens=False, split_special_tokens=True), 1)
            for text in found
        ]
    return tmp_path, documents


@pytest.mark.parametrize("mmap", [True, False])
def test_indexed_dataset(dataset: tuple[Path, list[Document]], mmap: bool) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    directory, documents = dataset
    read: list[Document] = []
    for name in ("first", "second"):
        found = IndexedDataset(str(directory / f"{name}_text_document"), mmap=mmap)
        assert found.document_indices.tolist() == list(range(len(found) + 1))
        read += [tuple(found[at].tolist()) for at in range(len(found))]
    assert read == documents


def test_gpt_dataset_and_blend(dataset: tuple[Path, list[Document]]) -> None:
    """Every sample is a stretch of the documents in the order that Megatron shuffled them to."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    directory, documents = dataset
    half = len(TEXTS[::2])
    paths = [str(directory / f"{name}_text_document") for name in ("first", "second")]
    blend, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [400, 0, 0], lambda: True, gpt_config(SEQUENCE, 1000, blend=(paths, [3.0, 1.0]))
    ).build()
    streams = []
    for part, own in zip(blend.datasets, (documents[:half], documents[half:]), strict=True):
        assert isinstance(part, GPTDataset)
        order = part.document_index
        streams.append(np.concatenate([own[int(at)] for at in order]))
    for at in range(len(blend)):
        sample = blend[at]
        which, number = int(sample["dataset_id"]), int(blend.dataset_sample_index[at])
        start = int(blend.datasets[which].shuffle_index[number]) * SEQUENCE
        expected = streams[which][start : start + SEQUENCE + 1]
        assert torch.equal(sample["tokens"], torch.as_tensor(expected[:-1]))
        assert torch.equal(sample["labels"], torch.as_tensor(expected[1:]))
    assert np.bincount(blend.dataset_index).tolist() == [300, 100]


def test_shards_as_a_blend(tmp_path: Path) -> None:
    """Weights of a set that was not merged: its shards as often as they are long."""
    from megatron.core.datasets.utils import get_blend_from_list

    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(source, tmp_path / "out", "--no-merge", "--shard-size", "60K")
    words = (tmp_path / "out_text_document.data-args.txt").read_text().split()
    prefixes, weights = get_blend_from_list(words)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    opened = [IndexedDataset(prefix) for prefix in prefixes]  # kept, as their arrays are views
    sizes = [int(dataset.sequence_lengths.sum()) for dataset in opened]
    assert len(sizes) > 2 and weights == [float(size) for size in sizes]
    assert run_tool("verify_dataset", tmp_path / "out_text_document").code == 0
