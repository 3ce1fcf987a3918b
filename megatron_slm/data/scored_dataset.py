"""Add reference losses and other values of tokens from score caches to the samples of datasets.

The classes wrap what Megatron's builder makes, so losses pass through loader workers, blends and
resumed runs as tokens do.  Nothing is copied or indexed again: a sample's number, or the positions
of its tokens in their file, say where its losses are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_slm.data.score_cache import Section
from megatron_slm.data.windows import Windows, windows_of
from megatron_slm.errors import UserError

FIELD = "reference_losses"
# How much of a file is hashed: enough to tell files apart without reading terabytes at every start.
BLOCKS, BLOCK_BYTES = 64, 1 << 16


class SampleScored(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of a split in the order in which training draws them, with their losses.

    Each sample gains reference_losses, float32 [s], the losses of its labels in nats.
    """

    def __init__(self, dataset: Any, section: Section) -> None:
        self.dataset, self.section = dataset, section

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = self.dataset[index]
        if index is None:  # padding of a batch, not trained on
            losses = np.zeros(sample["labels"].shape, np.float32)
        else:
            losses = self.section.losses(int(index), sample["labels"].numpy().astype(np.int32))
        sample[FIELD] = torch.from_numpy(losses)
        return sample

    def __getattr__(self, name: str) -> Any:
        """Pass on what Megatron asks a dataset for (split, index_split)."""
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class DocumentScored(GPTDataset):
    """A GPTDataset whose samples gain values of their labels, wherever these are in the file.

    Megatron's builder uses it in place of GPTDataset; `document_scored` makes such a class.
    """

    fields: dict[str, dict[str, Section]]
    """Sections by the field of a sample that they fill, and by the name of the dataset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = dataset_name(self.dataset_path)
        apart = self.config.inter_document_masking
        own = {field: by_name[name] for field, by_name in self.fields.items()}
        # Values that are not losses have no context, and are stored as if documents saw each other.
        self.read = {
            field: (section, self._windows(section, apart and field == FIELD))
            for field, section in own.items()
        }

    def _windows(self, section: Section, apart: bool) -> Windows:
        return windows_of(self.dataset.index, section.manifest.sequence_length, apart)

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        # Ask for the sample's documents as GPTDataset does, but get positions in place of tokens.
        self_of_positions = copy(self)
        self_of_positions.dataset = _Positions(self.dataset)
        positions, _, _ = self_of_positions._query_document_sample_shuffle_indices(idx or 0)
        # Padding has no position and no value, and is masked.
        positions = np.where(sample["loss_mask"].numpy() > 0, positions[1:], -1)
        for field, (section, windows) in self.read.items():
            sample[field] = torch.from_numpy(_losses_at(section, windows, positions))
        return sample


def document_scored(
    losses: dict[str, Section] | None, **values: dict[str, Section]
) -> type[GPTDataset]:
    """Make a class for Megatron's builder: a GPTDataset with values from sections.

    Args:
        losses: the sections of reference losses, by the dataset's name; None for none.
        values: those of other values, by the field of a sample that they fill.
    """
    fields = values if losses is None else values | {FIELD: losses}
    # A dataset finds its index in --data-cache-path by the name of its class.
    return type("GPTDataset", (DocumentScored,), {"fields": fields})


class _Positions:
    """Answers an IndexedDataset's get() with token positions in the .bin, int64."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.index = dataset.index

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.int64]:
        first = int(self.index.sequence_pointers[idx]) // self.index.dtype_size
        # Lengths are int32, in which numpy would add, and positions may be beyond.
        stop = self.index.sequence_lengths[idx] if length is None else offset + length
        return np.arange(first + offset, first + int(stop), dtype=np.int64)


def _losses_at(
    section: Section, windows: Windows, positions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the losses of the tokens at positions of a section's dataset; 0 for negative ones."""
    losses = np.zeros(positions.shape, np.float32)
    # Runs of consecutive positions in one window.
    numbers, places = windows.places(positions)
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(numbers) != 0)) + 1
    for start, stop in pairwise([0, *breaks.tolist(), len(positions)]):
        if positions[start] >= 0:
            offset = int(places[start])
            part = slice(offset, offset + stop - start)
            losses[start:stop] = section.losses(int(numbers[start]), None, part)
    return losses


class DocumentWindows(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset's tokens in the order of its file, cut into windows of s tokens to be scored.

    Every token is a label in exactly one window (windows.py); an end-of-document token is put
    before the first. A token thus has, on average, as much context as in a training sample.
    """

    def __init__(
        self, dataset: IndexedDataset, sequence_length: int, eod: int, apart: bool = False
    ) -> None:
        """Cut a dataset.

        Args:
            dataset: the dataset.
            sequence_length: tokens of a window, s.
            eod: id of the end-of-document token.
            apart: whether documents do not see each other.

        Raises:
            UserError: its index does not list the documents as they lie in the file.
        """
        self.eod, self.dataset = eod, dataset
        self.first = dataset.index.sequence_pointers // dataset.index.dtype_size
        ends = self.first + dataset.index.sequence_lengths
        if self.first[0] != 0 or (self.first[1:] != ends[:-1]).any():
            raise UserError(
                f"{dataset.path_prefix}.idx does not list the .bin's documents in order and "
                "without gaps; score it --by sample"
            )
        self.windows = Windows(dataset.index.sequence_lengths, sequence_length, apart)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = self.windows.span(index)
        length = self.windows.length
        stream = np.full(length + 1, self.eod, np.int64)
        stream[max(0, 1 - start) : stop - start + 1] = self._read(max(0, start - 1), stop)
        sample = {
            "tokens": torch.from_numpy(stream[:-1]),
            "labels": torch.from_numpy(stream[1:]),
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
        if self.windows.bounds is None:
            return sample
        ends = self.windows.ends(index)
        sample["position_ids"] -= torch.from_numpy(np.repeat(ends[:-1], np.diff(ends)))
        padded = np.full(length + 1, length, np.int32)  # as in Megatron's datasets
        padded[: len(ends)] = ends
        return sample | {"cu_seqlens": torch.from_numpy(padded)}

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        document = int(np.searchsorted(self.first, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self.first[document])
            length = min(int(self.dataset.index.sequence_lengths[document]) - offset, stop - start)
            if length > 0:  # an empty document begins where the next does
                parts.append(self.dataset.get(document, offset=offset, length=length))
            start += length
            document += 1
        return np.concatenate(parts)


def dataset_name(prefix: str) -> str:
    """Return the name of a dataset's files without the directory, so that caches survive moves."""
    return Path(prefix).name


def dataset_fingerprint(prefix: str) -> dict[str, str]:
    """Return, for each of a dataset's two files, its size and a hash of evenly spread blocks.

    Raises:
        UserError: there are no such files.
    """
    try:
        return {kind: _file_fingerprint(f"{prefix}.{kind}") for kind in ("bin", "idx")}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _file_fingerprint(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        size = stream.seek(0, 2)
        for start in range(0, size, max(BLOCK_BYTES, size // BLOCKS)):
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:32]}"


def check_names(prefixes: Sequence[str]) -> None:
    """Check that a blend's datasets have different names, since a cache identifies them by name.

    Raises:
        UserError: two of them have the same name.
    """
    names = [dataset_name(prefix) for prefix in prefixes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"datasets of a score cache need names of their own; {twice} occur twice")
