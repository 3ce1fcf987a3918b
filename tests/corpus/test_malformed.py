"""Forty-five ways in which an input can be bad: each is named with its file, the line where it has
one, and the reason; nothing is written that could be read as a dataset."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from corpus import MODEL, preprocess, write_jsonl
from megatron_slm.corpus.reading import lines

GOOD = b'{"text": "good"}\n'


@dataclass
class Line:
    """A bad line, and what is said about it."""

    content: bytes
    reason: str


LINES = {
    "cut off": Line(b'{"text": "cut off', "not JSON: unexpected end of data"),
    "two objects": Line(
        b'{"text": "a"}{"text": "b"}', "not JSON: unexpected content after document"
    ),
    "trailing comma": Line(b'{"text": "a",}', "not JSON: trailing comma is not allowed"),
    "single quotes": Line(b"{'text': 'a'}", "not JSON: unexpected character"),
    "no JSON at all": Line(b"plain text", "not JSON: unexpected character"),
    "NaN": Line(b'{"text": "a", "score": NaN}', "not JSON: unexpected character"),
    "control character": Line(b'{"text": "a\x01b"}', "not JSON: unexpected control character"),
    "NUL bytes": Line(b"\x00\x00\x00", "not JSON: unexpected character"),
    "bad escape": Line(b'{"text": "\\x41"}', "not JSON: invalid escape"),
    "byte order mark": Line(b'\xef\xbb\xbf{"text": "a"}', "byte order mark (BOM) is not supported"),
    "not UTF-8": Line(b'{"text": "\xff"}', "not valid UTF-8"),
    "Latin-1": Line('{"text": "naïve"}'.encode("latin-1"), "not valid UTF-8"),
    "UTF-16": Line('{"text": "a"}'.encode("utf-16-le"), "not JSON"),
    "overlong UTF-8": Line(b'{"text": "\xc0\xaf"}', "not valid UTF-8"),
    "high surrogate": Line(b'{"text": "a\\ud800"}', "not JSON: no low surrogate"),
    "low surrogate": Line(b'{"text": "a\\udc00"}', "not JSON: "),
    "surrogate bytes": Line(b'{"text": "\xed\xa0\x80"}', "not valid UTF-8"),
    "nested too deep": Line(b"[" * 100_000, "not JSON: depth limit exceeded"),
    "no object": Line(b'["text"]', "not a JSON object but a list"),
    "a string": Line(b'"text"', "not a JSON object but a str"),
    "null record": Line(b"null", "not a JSON object but a NoneType"),
    "no key": Line(b'{"content": "x"}', "no key 'text' among ['content']; see --json-keys"),
    "key of other case": Line(b'{"Text": "x"}', "no key 'text' among ['Text']"),
    "empty object": Line(b"{}", "no key 'text' among []"),
    "null text": Line(b'{"text": null}', "'text' is null"),
    "number": Line(b'{"text": 7}', "'text' is not a string but a int"),
    "boolean": Line(b'{"text": true}', "'text' is not a string but a bool"),
    "list": Line(b'{"text": ["x"]}', "'text' is not a string but a list"),
    "object": Line(b'{"text": {"en": "x"}}', "'text' is not a string but a dict"),
    "too long": Line(b'{"text": "' + b"x" * 5000 + b'"}', "longer than 4096 bytes"),
}


@pytest.mark.parametrize("kind", LINES)
def test_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 17 if kind == "nested too deep" else 4096)
    monkeypatch.setattr("megatron_slm.corpus.reading.documents.LONGEST_LINE", 4096)
    line = LINES[kind]
    write_jsonl(tmp_path / "first.jsonl", ["good"] * 9)
    bad = tmp_path / "second.jsonl"
    bad.write_bytes(GOOD * 3 + b"\n" + line.content + b"\n" + GOOD)
    result = preprocess([tmp_path / "first.jsonl", bad], tmp_path / "out", check=False)
    assert result.code == 2 and "Traceback" not in result.err
    error = result.err.splitlines()[-1]
    assert error.startswith("error: 1 of 14 documents could not be used")
    assert f"{bad}:5: " in error and line.reason in error
    assert not list(tmp_path.glob("out_text_document*"))
    (quarantined,) = (tmp_path / "out_rejects").iterdir()
    reject = json.loads(quarantined.read_text())
    assert reject["line"] == 5 and line.reason in reject["reason"]


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _spoiled(data: bytes) -> bytes:
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(byte ^ 0x55 for byte in data[middle : middle + 8])
        + data[middle + 8 :]
    )


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _parquet(column: str, values: pyarrow.Array) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: values}), sink)
    return sink.getvalue().to_pybytes()


DATA = b"".join(b'{"text": "number %d"}\n' % at for at in range(4000))
NUMBERS = pyarrow.array([f"number {at}" for at in range(4000)])

# Name of the file, its contents, and what is said.
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated gzip": ("in.jsonl.gz", lambda: _cut(gzip.compress(DATA)), "is truncated"),
    "damaged gzip": ("in.jsonl.gz", lambda: _spoiled(gzip.compress(DATA)), "is damaged"),
    "truncated zstd": ("in.jsonl.zst", lambda: _cut(_zstd(DATA)), "is truncated"),
    "damaged zstd": ("in.jsonl.zst", lambda: _spoiled(_zstd(DATA)), "is damaged"),
    "gzip behind another's name": ("in.jsonl", lambda: gzip.compress(DATA), "the contents of gzip"),
    "text behind zstd's name": ("in.jsonl.zst", lambda: DATA, "the contents of jsonl"),
    "bzip2": ("in.jsonl.bz2", lambda: b"BZh9", ".bz2 is not read"),
    "empty gzip": ("in.jsonl.gz", lambda: b"", "nothing in it"),
    "truncated parquet": (
        "in.parquet",
        lambda: _cut(_parquet("text", NUMBERS)),
        "cannot be read as parquet",
    ),
    "parquet without the column": ("in.parquet", lambda: _parquet("body", NUMBERS), "no column"),
    "parquet with nulls": (
        "in.parquet",
        lambda: _parquet("text", pyarrow.array(["a", None, "b"])),
        "in.parquet:2: 'text' is null",
    ),
    "parquet of numbers": (
        "in.parquet",
        lambda: _parquet("text", pyarrow.array([1, 2])),
        "in.parquet:1: 'text' is not a string but a int",
    ),
    "only empty texts": ("in.jsonl", lambda: b'{"text": ""}\n', "no document has any text"),
    "nothing but blank lines": ("in.jsonl", lambda: b"\n\n", "no document has any text"),
    "every line bad": ("in.jsonl", lambda: b"{\n" * 50, "in.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("kind", FILES)
def test_file(kind: str, tmp_path: Path) -> None:
    name, contents, message = FILES[kind]
    bad = tmp_path / name
    bad.write_bytes(contents())
    result = preprocess(bad, tmp_path / "out", check=False)
    assert result.code == 2 and "Traceback" not in result.err
    error = result.err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert str(bad) in error or "no document" in error
    assert not list(tmp_path.glob("out_text_document*"))
    if kind == "every line bad":
        (rejects,) = (tmp_path / "out_rejects").iterdir()
        assert len(rejects.read_text().splitlines()) == 50


def test_a_filter_on_what_is_nested_deep(tmp_path: Path) -> None:
    """Too deep to be compared, though not to be read."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b'{"text": "x", "meta": ' + b"[" * 500 + b"]" * 500 + b"}\n")
    result = preprocess(source, tmp_path / "out", "--filter", "meta=x", check=False)
    assert result.code == 2 and "Traceback" not in result.err
    assert f"{source}:2: 'meta' cannot be compared" in result.err


COMMANDS = {
    "no such input": (["--input", "absent.jsonl"], "--input absent.jsonl: no such file"),
    "a pattern without matches": (["--input", "*.gz"], "--input *.gz: no such file"),
    "an input twice": (["--input", "in.jsonl", "in.jsonl"], "names in.jsonl twice"),
    "nowhere to write": (
        ["--output-prefix", "in.jsonl/out"],
        "in.jsonl cannot be made a directory",
    ),
    "no such tokenizer": (["--tokenizer-model", "absent.model"], "absent.model: No such file"),
    "no tokenizer": (["--tokenizer-model", __file__], "no tokenizer that can be read"),
    "tokenizer of another type": (
        ["--tokenizer-type", "HuggingFaceTokenizer"],
        "is a sentencepiece",
    ),
    "engine of another kind": (["--engine", "hf"], "--engine hf cannot read"),
    "ids of special tokens": (["--special-tokens-in-text", "ids"], "always reads them as text"),
    "a key with a slash": (["--json-keys", "a/b"], "--json-keys a/b: "),
    "a key twice": (["--json-keys", "text", "text"], "names a key twice"),
    "no workers": (["--workers", "0"], "at least 1"),
    "no such template": (["--chat-template", "absent.jinja"], "absent.jinja"),
    "no such evaluation set": (["--decontaminate", "absent.jsonl"], "absent.jsonl cannot be read"),
    "rank beyond the world": (["--rank", "2", "--world-size", "2"], "--rank counts from 0"),
    "ranks without a stage": (["--rank", "0", "--world-size", "2"], "needs --stage"),
    "standard input of a stage": (
        ["--input", "-", "--stage", "tokenize"],
        "do not share standard input",
    ),
    "a stage without fingerprints": (
        ["--stage", "tokenize", "--dedup", "exact"],
        "has no fingerprints yet",
    ),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_command_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", ["text"])
    changes, message = COMMANDS[kind]
    result = preprocess("in.jsonl", Path("out"), *changes, check=False)
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: ") and message in result.err
    assert not list(tmp_path.rglob("*.idx"))


def test_full_disk(tmp_path: Path) -> None:
    import resource

    source = write_jsonl(tmp_path / "in.jsonl", ["a text of some length"] * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        result = preprocess(source, tmp_path / "out", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 2 and "cannot write shard" in result.err
    assert "File too large" in result.err
    assert not list(tmp_path.rglob("*.idx")) and not list(tmp_path.rglob("*.bin"))
    assert MODEL.exists()
