"""Values from files on a dataset's tokens, and what is said of files that are not of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from corpus import MODEL, PIECES, Document, Result, preprocess, read_dataset, run_tool, write_jsonl
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import read_cache_manifest
from megatron_slm.files import temporary
from megatron_slm.jobs.outside.import_values import SPOOL
from real_text import docstrings
from small_disk import small_disk

RUN = ("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", MODEL, "--seq-length", 40)
TEXTS = [*docstrings(["difflib"])[:6], "naïve 東京 🎲 x"]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("data")
    preprocess(write_jsonl(where / "in.jsonl", TEXTS), where / "out", "--append-eod")
    return where / "out_text_document"


@pytest.fixture(scope="module")
def documents(prefix: Path) -> list[Document]:
    return read_dataset(prefix)


def imported(prefix: Path, files: Any, cache: Path, kind: str, *more: object) -> Result:
    files = files if isinstance(files, list) else [files]
    options = ("--data-path", prefix, *RUN, "--slm-reference-cache", cache)
    return run_tool("import_scores", *files, "--as", kind, *options, *more)


def values_of(cache: Path, prefix: Path, documents: list[Document]) -> list[np.ndarray]:
    manifest = read_cache_manifest(cache)
    section = Section(cache, manifest, prefix.name)
    stream = np.concatenate([section.losses(number, None) for number in range(len(section))])
    ends = np.cumsum([len(ids) for ids in documents])
    return np.split(stream[: ends[-1]], ends[:-1])


def write(path: Path, records: list[Any]) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def good(documents: list[Document]) -> list[dict[str, Any]]:
    """A loss for each token, with all that can be verified."""
    return [
        {
            "document": number,
            "values": [token % 7 / 4 for token in ids],
            "tokens": list(ids),
            "tokens_sha256": hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest(),
            "text": TEXTS[number],
            "url": "ignored",
        }
        for number, ids in enumerate(documents)
    ]


def test_values(prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """In any order, from several files, of any kind of file; a second time nothing changes."""
    records = good(documents)
    write(tmp_path / "a.jsonl.gz", [*records[3:], ""])
    table = pyarrow.Table.from_pylist(
        [{k: each[k] for k in each if k != "url"} for each in records]
    )
    parquet.write_table(table.slice(0, 3), tmp_path / "b.parquet", row_group_size=2)
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.parquet"]
    for _ in range(2):
        result = imported(prefix, files, tmp_path / "c", "reference", "--cache-dtype", "float32")
        assert result.code == 0, result.err
    for record, found in zip(records, values_of(tmp_path / "c", prefix, documents), strict=True):
        assert np.array_equal(found, np.array(record["values"], np.float32))
    other = imported(prefix, files[:1], tmp_path / "c", "reference", "--default", 1)
    assert other.code == 2 and "was begun with other arguments" in other.err
    assert not list((tmp_path / "c").glob("*.partial"))


def test_no_room(prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """A disk without room for the values leaves nothing; leftovers of a killed import go."""
    file = write(tmp_path / "values.jsonl", good(documents))
    with small_disk(tmp_path / "small", "4k") as disk:
        error = imported(prefix, file, disk / "cache", "reference").err
        assert error.startswith(f"error: cannot write {disk}/cache/values.")
        assert error.endswith(": No space left on device\n") and not list(disk.iterdir())
    killed = subprocess.Popen(["true"])
    killed.wait()
    cache = tmp_path / "cache"
    cache.mkdir()
    left = temporary(cache / SPOOL)
    left = left.with_name(left.name.replace(f"-{os.getpid()}.", f"-{killed.pid}."))
    left.write_bytes(b"left")
    assert imported(prefix, file, cache, "reference").code == 0
    assert not left.exists()


def test_losses_beyond_uint16(prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """They are capped, and counted, also where a cache is there already."""
    records = good(documents)
    records[0]["values"][:3] = [63.0, 64.0, 1000.0]
    records[1]["values"][0] = 1e30
    file = write(tmp_path / "values.jsonl", records)
    for _ in range(2):
        result = imported(prefix, file, tmp_path / "c", "reference")
        assert result.code == 0, result.err
        assert "> 3 losses above 64.00 nats became that" in result.out
    found = values_of(tmp_path / "c", prefix, documents)
    assert found[0][:3] == pytest.approx([63.0, 63.998, 63.998], abs=1e-3)
    whole = imported(prefix, file, tmp_path / "f", "reference", "--cache-dtype", "float32")
    assert whole.code == 0 and "losses above" not in whole.out


def test_losses_by_character(prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """A word's loss is its tokens' together; the end of a document has the mean of the rest."""
    records = []
    for text in TEXTS:
        at, spans = 0, []
        for word in text.split():
            at = text.index(word, at)
            spans.append([at, at + len(word), len(word) / 3])
            at += len(word)
        records.append({"spans": spans})
    file = write(tmp_path / "words.jsonl", records)
    result = imported(prefix, file, tmp_path / "c", "reference", "--cache-dtype", "float32")
    assert result.code == 0, result.err
    found = values_of(tmp_path / "c", prefix, documents)
    for text, ids, values in zip(TEXTS, documents, found, strict=True):
        assert values[:-1].sum() == pytest.approx(sum(map(len, text.split())) / 3, rel=1e-5)
        assert values[-1] == pytest.approx(values[:-1].mean(), rel=1e-5)
        first = text.split()[0]
        count = len(PIECES.encode(first))
        if PIECES.encode(first) == list(ids[:count]):
            assert values[:count].sum() == pytest.approx(len(first) / 3, rel=1e-5)


def test_external_values_and_masks(prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """A token has the mean of the values on its bytes; a mask's 0 wins."""
    text = TEXTS[-1]
    spans = [[0, 3, -2.0], [3, 5, 4.0], [6, 8, 1.5], [9, 10, 8.0]]
    file = write(tmp_path / "spans.jsonl", [{"document": len(TEXTS) - 1, "spans": spans}])
    result = imported(prefix, file, tmp_path / "c", "external", "--default", 9)
    assert result.code == 0, result.err
    *others, found = values_of(tmp_path / "c", prefix, documents)
    assert all((each == 9).all() for each in others)
    number = np.full(len(text.encode()), np.nan)
    for first, last, value in spans:
        number[len(text[:first].encode()) : len(text[:last].encode())] = value
    at = 0
    for token, value in zip(documents[-1], found, strict=True):
        piece = PIECES.id_to_piece(token)
        size = 1 if PIECES.is_byte(token) else len(piece.replace("\u2581", " ").encode())
        size = 0 if PIECES.is_control(token) else size - (at == 0)
        own = number[at : at + size]
        known = own[~np.isnan(own)]
        assert value == pytest.approx(known.mean() if len(known) else 9.0), piece
        at += size
    assert read_cache_manifest(tmp_path / "c").values == "external"

    masks = [{"document": 0, "token_spans": [[0, 4, 1], [2, 3, 0]]}]
    result = imported(
        prefix, write(tmp_path / "m.jsonl", masks), tmp_path / "m", "mask", "--default", 1
    )
    assert result.code == 0, result.err
    found = values_of(tmp_path / "m", prefix, documents)[0]
    assert found.tolist() == [1, 1, 0, *[1] * (len(found) - 3)]
    manifest = read_cache_manifest(tmp_path / "m")
    assert (manifest.values, manifest.dtype) == ("mask", "uint16")


Change = Callable[[list[dict[str, Any]]], Any]


def of_first(**changes: Any) -> Change:
    """Change fields of document 1's record; None takes one away."""

    def change(records: list[dict[str, Any]]) -> None:
        records[1] |= changes
        records[1] = {key: each for key, each in records[1].items() if each is not None}

    return change


def line(content: str) -> Change:
    def change(records: list[Any]) -> None:
        records[1] = content

    return change


def only(**fields: Any) -> Change:
    return of_first(**dict.fromkeys(("values", "tokens", "tokens_sha256", "text")) | fields)


def first_values(number: Any) -> Change:
    def change(records: list[dict[str, Any]]) -> None:
        records[1]["values"][0] = number

    return change


# What is wrong with the record of document 1, and what is said of it.
MALFORMED: dict[str, tuple[str, Change, str]] = {
    "no JSON": ("reference", line("{"), "record: Input data was truncated"),
    "a list": ("reference", line("[1]"), "record: Expected `object`, got `array`"),
    "nested": ("reference", line('{"x": ' + "[" * 100_000), "nested too deeply"),
    "NaN": ("reference", line('{"values": [NaN]}'), "JSON is malformed"),
    "not UTF-8": ("reference", line('{"text": "\\ud800", "values": []}'), "record: "),
    "no values": ("reference", of_first(values=None), "record: has none of them; it needs one of"),
    "two forms": ("reference", of_first(spans=[]), "record: has values and spans; it needs one"),
    "too few": ("reference", of_first(values=[1.0]), "values: there are 1, but the document has"),
    "text for a number": (
        "reference",
        first_values("x"),
        "values[0]: Expected `float | null`, got `str`",
    ),
    "a missing value": ("reference", first_values(None), "values: no value of token 0; --default"),
    "a loss below 0": ("reference", first_values(-1.0), "values: -1 of token 0 is not a loss"),
    "a mask of halves": ("mask", first_values(0.5), "values: 0.5 of token 0 is not 0 or 1"),
    "an infinite value": ("external", line('{"values": [1e999]}'), "out of range"),
    "a loss beyond 32 bits": (
        "reference",
        first_values(1e300),
        "values[0]: 1e+300 is not a finite number of 32 bits",
    ),
    "a value beyond 32 bits": (
        "external",
        first_values(-3.5e38),
        "values[0]: -3.5e+38 is not a finite number of 32 bits",
    ),
    "a sum beyond 32 bits": (
        "reference",
        lambda records: only(
            token_spans=[[0, 1, 3e38], [0, 1, 3e38], [1, len(records[1]["values"]), 1.0]]
        )(records),
        "token_spans: 6e+38 of token 0 is not a loss, finite and from 0 on",
    ),
    "other tokens": (
        "reference",
        of_first(tokens=[5]),
        "tokens: there are 1, but the document has",
    ),
    "another token": (
        "reference",
        lambda records: records[1]["tokens"].__setitem__(2, 31999),
        "tokens[2]: 31999, but the dataset has",
    ),
    "another hash": ("reference", of_first(tokens_sha256="0"), "tokens_sha256: 0, but the dataset"),
    "another text": (
        "reference",
        lambda records: records[1].update(text=records[1]["text"][:9] + "#"),
        "text: '#' at character 9, but the dataset's tokens say",
    ),
    "a number as a hash": (
        "reference",
        of_first(tokens_sha256=5),
        "tokens_sha256: Expected `str | null`, got `int`",
    ),
    "a document beyond": (
        "reference",
        of_first(document=99),
        f"document: the dataset {{prefix}} has {len(TEXTS)} documents",
    ),
    "a document below 0": ("reference", of_first(document=-1), "document: Expected `int` >= 0"),
    "a document twice": ("reference", of_first(document=0), "document: it has values already"),
    "a span beyond": ("reference", only(spans=[[0, 10**6, 1]]), "spans[0]: from 0 to 1000000, but"),
    "a span backwards": ("external", only(spans=[[5, 2, 1]]), "spans[0]: from 5 to 2, but"),
    "spans in disorder": (
        "external",
        only(spans=[[5, 6, 1], [2, 3, 1]]),
        "spans[1]: it begins before the one before it",
    ),
    "a span of two": (
        "external",
        only(spans=[[5, 6]]),
        "spans[0]: Expected `array` of length 3",
    ),
    "a token that no span has": (
        "external",
        only(token_spans=[[0, 2, 1]]),
        "token_spans: no value of token 2",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, prefix: Path, documents: list[Document], tmp_path: Path) -> None:
    """One line that names file, line, document and field; nothing is left."""
    kind, change, said = MALFORMED[case]
    records = good(documents)
    if kind == "mask":
        for record in records:
            record["values"] = [1 for _ in record["values"]]
    change(records)
    content = [json.dumps(records[0]), *records[1:]]
    file = write(tmp_path / "values.jsonl", content)
    result = imported(prefix, file, tmp_path / "cache", kind)
    assert result.code == 2
    (error,) = result.err.splitlines()
    number = {"a document beyond": 99, "a document twice": 0}.get(case, 1)
    assert error.startswith(f"error: {file}:2: document {number}: "), error
    assert said.format(prefix=prefix) in error
    assert not (tmp_path / "cache").exists()


FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a document missing": (
        lambda path: None,
        "values.jsonl",
        "document 6: no values of it, nor of 0 others; --default X gives them one",
    ),
    "cut off": (
        lambda path: path.write_bytes(gzip.compress(path.read_bytes())[:-9]),
        "values.jsonl.gz",
        "is truncated",
    ),
    "not parquet": (lambda path: path.write_bytes(b"PAR1 but no more"), "v.parquet", "as parquet"),
    "no columns": (
        lambda path: parquet.write_table(pyarrow.table({"x": [1]}), path),
        "v.parquet",
        "has none of the columns values, spans, token_spans",
    ),
    "a column of text": (
        lambda path: parquet.write_table(pyarrow.table({"values": ["x"]}), path),
        "v.parquet",
        ":1: document 0: values: Expected `array | null`, got `str`",
    ),
    "an infinite value": (
        lambda path: parquet.write_table(pyarrow.table({"values": [[float("inf")]]}), path),
        "v.parquet",
        ":1: document 0: values[0]: inf is not a finite number",
    ),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "v.jsonl", "not a regular file"),
}


@pytest.mark.parametrize("case", FILES)
def test_malformed_files(
    case: str, prefix: Path, documents: list[Document], tmp_path: Path
) -> None:
    make, name, said = FILES[case]
    file = write(tmp_path / name.removesuffix(".gz"), good(documents)[:-1])
    file = file.rename(tmp_path / name)
    make(file)
    result = imported(prefix, file, tmp_path / "cache", "reference")
    assert result.code == 2
    (error,) = result.err.splitlines()
    assert error.startswith(f"error: {file}") and said in error, error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "default", "must"),
    [
        ("mask", 0.5, "0 or 1"),
        ("mask", "nan", "0 or 1"),
        ("reference", -1, "a loss, finite and from 0 on"),
        ("reference", "nan", "a loss, finite and from 0 on"),
        ("external", "inf", "a finite number of 32 bits"),
        ("external", 3.5e38, "a finite number of 32 bits"),
    ],
)
def test_default_of_another_kind(
    kind: str, default: object, must: str, prefix: Path, tmp_path: Path
) -> None:
    """Refused before anything is read: there is no file of values."""
    file = tmp_path / "nothing.jsonl"
    result = imported(prefix, file, tmp_path / "cache", kind, "--default", default)
    assert result.code == 2
    (error,) = result.err.splitlines()
    said = f"{default:g}" if isinstance(default, float) else default
    assert error == f"error: --default {said}: with --as {kind} it must be {must}"
    assert not (tmp_path / "cache").exists()
