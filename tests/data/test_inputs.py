"""Which files are read, and what of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import zstandard
from corpus import ids_of, preprocess, read_dataset, texts, write_jsonl

from megatron_slm.data.inputs import Task, open_piece
from megatron_slm.data.manifest import what_changed

TEXTS = texts()


def test_directories_with_links(tmp_path: Path) -> None:
    """Each directory once, however it is reached; suffixes in any case."""
    for name in ("in", "elsewhere"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "in" / "A.JSONL", ["one"])
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ["two"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "README").write_text("not an input")
    result = preprocess(tmp_path / "in", tmp_path / "out")
    assert f"{tmp_path / 'in'}: passed over 1 files of other kinds" in result.err
    documents = read_dataset(tmp_path / "out_text_document")
    assert documents == [ids_of(text, eod=False) for text in ("one", "two")]


def test_zstd_with_skippable_frames_and_padding(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    skippable = bytes.fromhex("502a4d18 04000000") + b"note"
    half = len(source.read_bytes()) // 2
    parts = [source.read_bytes()[:half], source.read_bytes()[half:]]
    frames = [skippable + zstandard.compress(part) for part in parts]
    packed = tmp_path / "in.jsonl.zst"
    packed.write_bytes(bytes(70_000).join(frames) + skippable + bytes(70_000))
    preprocess(packed, tmp_path / "out", "--append-eod")
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(text) for text in TEXTS]


def test_blank_lines_need_no_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To count lines reads all of the file that is before the shard."""
    monkeypatch.setattr(
        "megatron_slm.data.documents.first_line_number", lambda piece: pytest.fail(str(piece))
    )
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n\n' * 100)
    preprocess(source, tmp_path / "out", "--shard-size", "500")
    assert len(read_dataset(tmp_path / "out_text_document")) == 100


def test_a_template_that_fails(tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{{ 1 // (messages[0].content | int) }}")
    source = tmp_path / "in.jsonl"
    contents = [*"1111", "0"]
    source.write_text(
        "".join(json.dumps({"c": [{"role": "user", "content": n}]}) + "\n" for n in contents)
    )
    options = ("--json-keys", "c", "--chat-template", template)
    result = preprocess(source, tmp_path / "out", *options, check=False)
    assert result.code == 2 and f"{source}:5: the chat template cannot render it" in result.err
    shutil.rmtree(tmp_path / "out_rejects")
    result = preprocess(source, tmp_path / "out", *options, check=False)
    assert result.code == 2 and "their list in" in result.err and "Traceback" not in result.err


def test_another_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [name])
        os.utime(source, (1, 1))
    preprocess(tmp_path / "one.jsonl", tmp_path / "out", "--no-merge")
    shard = next((tmp_path / "out_shards").glob("*.json"))
    manifest = json.loads(shard.read_text())
    task = Task("x", (open_piece(str(tmp_path / "two.jsonl")),))
    assert what_changed(task, manifest["options"], manifest) == "its input has changed"
    task = Task("x", (open_piece(str(tmp_path / "one.jsonl")),))
    assert what_changed(task, manifest["options"], manifest) is None
