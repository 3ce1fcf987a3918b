"""Read files of values: a JSON object a line, or a parquet row, for each document.

document       its number in the dataset, from 0; without it, the records' order counts
values         one number for each of its tokens, or null
spans          [first character, character after the last, number] each, or
token_spans    the same with tokens; exactly one of these three is given
tokens, tokens_sha256, text    what it must have: its ids, their SHA-256 as int32, its text
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from megatron_slm.corpus.reading.inputs import open_piece
from megatron_slm.corpus.reading.lines import LONGEST_LINE, InputHash, read_lines
from megatron_slm.corpus.reading.parquet import read_rows
from megatron_slm.errors import UserError
from megatron_slm.jobs.outside.command_line import LARGEST

FORMS = ("values", "spans", "token_spans")

_Place = Annotated[int, Meta(ge=0, le=1 << 40)]
Spans = list[tuple[_Place, _Place, float | None]]


class ValueRecord(msgspec.Struct):
    """What a file says of a document."""

    document: _Place | None = None
    values: list[float | None] | None = None
    spans: Spans | None = None
    token_spans: Spans | None = None
    tokens: list[int] | None = None
    tokens_sha256: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class RecordPlace:
    """Where a record stands, for errors."""

    path: str
    line: int
    """Line of the file, or row, from 1."""
    document: int
    """Number of its document."""

    def error(self, field: str, what: str) -> UserError:
        """Return the error about a field of the record."""
        return UserError(f"{self.path}:{self.line}: document {self.document}: {field}: {what}")


def read_records(paths: list[str]) -> Iterator[tuple[RecordPlace, ValueRecord]]:
    """Yield the records of all files in order.

    Raises:
        UserError: a file cannot be read, or a record is not of the form that the module describes.
    """
    count = 0
    for path in paths:
        read = _rows if open_piece(path).kind == "parquet" else _lines
        for line, content in read(path):
            place = RecordPlace(path, line, count)
            count += 1
            try:
                record = (
                    msgspec.json.decode(content, type=ValueRecord)
                    if isinstance(content, bytes)
                    else msgspec.convert(content, ValueRecord)
                )
            except (ValueError, RecursionError) as error:
                field, what = _in_words(error)
                raise place.error(field, what) from error
            if record.document is not None:
                place = RecordPlace(path, line, record.document)
            yield place, _checked(place, record)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    first = 1
    for lines in read_lines(open_piece(path), InputHash(lambda _: None)):
        if isinstance(lines, int):
            first += lines
            continue
        for number, line in enumerate(lines, first):
            if line is None:
                raise UserError(f"{path}:{number}: longer than {LONGEST_LINE} bytes")
            if line.strip():
                yield number, line
        first += len(lines)


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        present = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as parquet: {said}") from error
    names = [name for name in ValueRecord.__struct_fields__ if name in present]
    if not names:
        raise UserError(f"{path} has none of the columns {', '.join(FORMS)}, but {present}")
    first = 1
    for rows in read_rows(open_piece(path), names, [], InputHash(lambda _: None)):
        for number, row in enumerate(rows, first):
            if isinstance(row, Exception):
                raise UserError(f"{path}:{number}: has a value that cannot be read: {row}")
            yield number, {name: _plain_spans(value) for name, value in row.items()}
        first += len(rows)


def _plain_spans(value: Any) -> Any:
    """Return spans that are structs (start, end, value) as lists; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return [[each.get(name) for name in ("start", "end", "value")] for each in value]
    return value


def _in_words(error: Exception) -> tuple[str, str]:
    """Return the field that an error of decoding is about, and what it says."""
    if isinstance(error, RecursionError):
        return "record", "it is nested too deeply"
    what, _, where = " ".join(str(error).split()).partition(" - at `$.")
    return where.rstrip("`") or "record", what


def _checked(place: RecordPlace, record: ValueRecord) -> ValueRecord:
    given = [name for name in FORMS if getattr(record, name) is not None]
    if len(given) != 1:
        has = " and ".join(given) or "none of them"
        raise place.error("record", f"has {has}; it needs one of {', '.join(FORMS)}")
    (form,) = given
    numbers = record.values if form == "values" else [each[2] for each in getattr(record, form)]
    for at, number in enumerate(numbers or []):
        if number is not None and not abs(number) <= LARGEST:
            raise place.error(f"{form}[{at}]", f"{number} is not a finite number of 32 bits")
    return record


def check_tokens(place: RecordPlace, record: ValueRecord, ids: NDArray[np.int64]) -> None:
    """Check what a record says of its document's token ids [n].

    Raises:
        UserError: the dataset's document has others.
    """
    if record.values is not None and len(record.values) != len(ids):
        raise place.error(
            "values", f"there are {len(record.values)}, but the document has {len(ids)} tokens"
        )
    if record.tokens is not None:
        if len(record.tokens) != len(ids):
            raise place.error(
                "tokens", f"there are {len(record.tokens)}, but the document has {len(ids)}"
            )
        for at, (given, own) in enumerate(zip(record.tokens, ids.tolist(), strict=True)):
            if given != own:
                raise place.error(f"tokens[{at}]", f"{given}, but the dataset has {own}")
    if record.tokens_sha256 is not None:
        own_hash = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
        if record.tokens_sha256.lower() != own_hash:
            raise place.error(
                "tokens_sha256", f"{record.tokens_sha256[:64]}, but the dataset's is {own_hash}"
            )
