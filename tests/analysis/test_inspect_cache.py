"""What is said of a score cache's figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import UNSET

from megatron_slm.analysis.inspect_cache import inspect
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import write_shard
from megatron_slm.data.score_manifest import CacheManifest


@pytest.mark.parametrize("apart", [True, False])
def test_padding_is_named(apart: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows of documents that do not see each other end early; the rest counts as tokens."""
    source = ScoredData("t", 9, {"d": {}}, inter_document_masking=apart or UNSET)
    manifest = CacheManifest("document", "float32", 4, 1, {"d": 1}, source, {})
    manifest.write(tmp_path)
    losses, labels = np.ones((1, 4), np.float32), np.ones((1, 4), np.int32)
    write_shard(tmp_path, manifest, "d", 0, losses, labels, np.zeros(1, np.int64))
    inspect([str(tmp_path)])
    assert ("with padding" in capsys.readouterr().out) == apart
