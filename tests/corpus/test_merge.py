"""Merging shards where the kernel cannot copy."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_slm.corpus.indexed.merge import DocumentRange, merge
from megatron_slm.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]
BYTES = 2  # of a token


def unable(*_: Any) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    prefix = tmp_path / "shard"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("by_kernel", [lambda *_: 0, unable, os.copy_file_range])
def test_merging(by_kernel: Any, shard: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Some file systems answer that they cannot, and some copy nothing."""
    monkeypatch.setattr(os, "copy_file_range", by_kernel)
    last, whole = DocumentRange(shard, 3, 1, 4 * BYTES, 4 * BYTES), 8 * BYTES
    merged = tmp_path / "merged"
    merge(merged, [last, DocumentRange(shard, 0, 4, 0, whole)], np.dtype(np.uint16), 2)
    for suffix in ("bin", "idx"):
        Path(f"{merged}.{suffix}.next").rename(f"{merged}.{suffix}")
    found = IndexedDataset(str(merged))
    assert [found[at].tolist() for at in range(len(found))] == [DOCUMENTS[3], *DOCUMENTS]


@pytest.mark.parametrize("by_kernel", [lambda *_: 0, os.copy_file_range])
def test_a_shard_that_became_shorter(
    by_kernel: Any, shard: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(os, "copy_file_range", by_kernel)
    os.truncate(f"{shard}.bin", 6 * BYTES)
    with pytest.raises(UserError, match=r"shard\.bin became shorter while it was copied"):
        parts = [DocumentRange(shard, 0, 4, 0, 8 * BYTES)]
        merge(tmp_path / "merged", parts, np.dtype(np.uint16), 1)
    assert not list(tmp_path.glob("merged*"))
