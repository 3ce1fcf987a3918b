"""Which files are read, and what of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from corpus import ids_of, preprocess, read_dataset, texts, write_jsonl
from megatron_slm.corpus.preprocessing import preprocess as preprocess_module
from megatron_slm.corpus.reading.documents import Wanted, read_documents
from megatron_slm.corpus.reading.input_records import what_changed
from megatron_slm.corpus.reading.inputs import Task, open_piece
from megatron_slm.corpus.reading.lines import InputHash
from megatron_slm.data.manifest import read_manifest
from megatron_slm.data.manifest_types import ShardManifest

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
        "megatron_slm.corpus.reading.documents.first_line_number",
        lambda piece: pytest.fail(str(piece)),
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


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = os.fsencode(tmp_path / "in") + b"/na\xefve.jsonl"
    with open(source, "wb") as file:
        file.write(b'{"text": "x"}')
    result = preprocess(tmp_path / "in", tmp_path / "out", check=False)
    assert result.code == 2 and f"{source!r} is not UTF-8; rename it" in result.err


@pytest.mark.parametrize("words", [["other", "text"], ["one", "two", "three", "four"]])
def test_a_file_that_changes_under_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Verdicts on duplicates are of the documents that were there, by number."""
    source = tmp_path / "in.jsonl.zst"
    with_text = '{{"text": "{}"}}\n'.format
    source.write_bytes(zstandard.compress((with_text("same") * 2).encode()))
    found = preprocess_module.make_verdicts

    def make_verdicts(*arguments: Any) -> Any:
        verdicts = found(*arguments)
        source.write_bytes(zstandard.compress("".join(map(with_text, words)).encode()))
        return verdicts

    monkeypatch.setattr(preprocess_module, "make_verdicts", make_verdicts)
    result = preprocess(source, tmp_path / "out", "--dedup", "exact", check=False)
    assert result.code == 2 and f"{source} has changed since its duplicates" in result.err
    assert not list(tmp_path.rglob("*.idx"))
    monkeypatch.undo()
    preprocess(source, tmp_path / "out", "--dedup", "exact")
    documents = read_dataset(tmp_path / "out_text_document")
    assert documents == [ids_of(word, eod=False) for word in words]


def test_a_column_with_a_dot_in_its_name(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", "two"], "meta.set": ["a", "b"], "meta": [None, None]})
    for columns in (["text", "meta.set"], ["text", "meta.set", "meta"]):
        pyarrow.parquet.write_table(table.select(columns), tmp_path / "in.parquet")
        preprocess(tmp_path / "in.parquet", tmp_path / "out", "--filter", "meta.set=b")
        assert read_dataset(tmp_path / "out_text_document") == [ids_of("two", eod=False)]


def test_parquet_is_read_by_and_by(tmp_path: Path) -> None:
    """Its bytes count as its row groups are read, and no row group is held as a whole."""
    source = tmp_path / "in.parquet"
    rows = [os.urandom(2000).hex() for _ in range(8000)]
    options: Any = {"row_group_size": 4000, "use_dictionary": False, "compression": "none"}
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), source, **options)
    size = source.stat().st_size
    counted: list[int] = []
    seen = InputHash(counted.append)
    before, most, read = pyarrow.total_allocated_bytes(), 0, []
    halfway = None
    for batch in read_documents(open_piece(str(source)), Wanted(("text",)), seen):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        read += [text for (text,) in batch.texts]
        if len(read) > 4000 and halfway is None:
            halfway = sum(counted)
    assert read == rows and most < size / 4
    assert halfway is not None and size / 2 <= halfway < size * 0.6
    assert seen.digest.hexdigest() == hashlib.sha256(source.read_bytes()).hexdigest()
    assert sum(counted) == size


def test_another_file_of_the_same_size_and_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [name])
        os.utime(source, (1, 1))
    preprocess(tmp_path / "one.jsonl", tmp_path / "out", "--no-merge")
    shard = next((tmp_path / "out_shards").glob("*.json"))
    manifest = read_manifest(shard, ShardManifest)
    assert manifest is not None
    task = Task("x", (open_piece(str(tmp_path / "two.jsonl")),))
    assert what_changed(task, manifest.options, manifest) == "its input has changed"
    task = Task("x", (open_piece(str(tmp_path / "one.jsonl")),))
    assert what_changed(task, manifest.options, manifest) is None
