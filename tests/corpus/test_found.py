"""What a run finds of earlier ones: each manifest is read once, and what serves is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from corpus import preprocess, texts, write_jsonl
from megatron_slm.corpus.file_names import DECIDED
from megatron_slm.data import manifest
from megatron_slm.files import read_bounded


@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_each_manifest_is_read_once(
    merge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()

    def counted(path: Path, limit: int) -> bytes:
        reads[path.name] += 1
        return read_bounded(path, limit)

    monkeypatch.setattr(manifest, "read_bounded", counted)
    options = ("--dedup", "exact", "--shard-size", "4K", merge)
    found = texts()
    sources: list[Path] = []
    for added in (found[:60], found[60:90], []):  # from nothing; with more input; with the same
        if added:
            sources.append(write_jsonl(tmp_path / f"{len(sources)}.jsonl", added))
        reads.clear()
        said = preprocess(sources, tmp_path / "out", *options).err
        assert "out_text_document.manifest.json" in reads
        assert {name for name, count in reads.items() if count > 1} <= {DECIDED}
    assert "nothing to do" in said
