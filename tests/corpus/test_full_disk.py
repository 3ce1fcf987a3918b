"""A disk that is full at any moment: one line says so, nothing is left that is neither absent nor
whole, and when there is room again the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpus import preprocess, texts, write_jsonl
from small_disk import small_disk

STEP = 20  # KiB by which the disk grows
PAIR = [f"out_text_document.{suffix}" for suffix in ("bin", "idx")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", f"{STEP}K") as directory:
        yield directory


@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_a_disk_that_is_full(tmp_path: Path, disk: Path, merge: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts()[:150])
    options = ("--append-eod", "--shard-size", "40K", "--dedup", "near", merge)
    preprocess(source, tmp_path / "out", *options)
    whole = {path.name: path.read_bytes() for path in tmp_path.rglob("out*/*.bin")}
    whole |= {path.name: path.read_bytes() for path in tmp_path.glob("out_text_document.*")}
    errors = []
    for size in range(STEP, 100 * STEP, STEP):
        subprocess.run(["mount", "-o", f"remount,size={size}K", disk], check=True)
        result = preprocess(source, disk / "out", *options, check=False)
        found = {path.name: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        assert not [name for name in found if name.endswith(".partial")]
        for name in found.keys() & whole.keys():
            if name.endswith((".bin", ".idx")):
                assert found[name] == whole[name], name
        if result.code == 0:
            break
        assert result.code == 2 and "Traceback" not in result.err
        errors.append(result.err.splitlines()[-1])
        assert "No space left on device" in errors[-1]
        assert "out_text_document.manifest.json" not in found
        assert "out_text_document.data-args.txt" not in found or merge == "--no-merge"
    assert {name for name in found if name.startswith("out_text")} == {
        name for name in whole if name.startswith("out_text")
    }
    assert any("fingerprints" in line for line in errors)
    assert any("cannot write shard" in line for line in errors)
    assert any(f"cannot write {disk / PAIR[0]}" in line for line in errors) or merge != "--merge"
