"""Read the documents of a task's pieces: the strings under the wanted keys, batch by batch.

Records that cannot be used are reported with their file, line and reason.  A batch is parsed in one
go; only if something in it is wrong is it parsed line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_slm.corpus.reading.inputs import Piece
from megatron_slm.corpus.reading.lines import (
    LONGEST_LINE,
    InputHash,
    first_line_number,
    read_lines,
)
from megatron_slm.corpus.reading.parquet import Row, read_rows
from megatron_slm.data.manifest_types import Reject

QUARANTINED = 4096  # bytes kept of a bad line

Render = Callable[[Any], str]


class BadRecord(Exception):
    """A record cannot be used; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """Which records to take, and which texts in them."""

    keys: tuple[str, ...]
    """Keys of the texts; each makes a dataset."""
    filters: tuple[tuple[str, str], ...] = ()
    """Pairs of a field, given by its dotted path, and the value that records must have there."""
    render: Render | None = None
    """Function that turns a value under a key into text, unless it is text already."""

    def texts(self, record: Any) -> tuple[str, ...] | None:
        """Return the texts of a record, one for each key; None if a filter leaves it out.

        Raises:
            BadRecord: a key is missing, or its value is not text.
        """
        if not isinstance(record, dict):
            raise BadRecord(f"not a JSON object but a {type(record).__name__}")
        if not all(_field(record, path) == value for path, value in self.filters):
            return None
        return tuple(self._text(record, key) for key in self.keys)

    def _text(self, record: dict[str, Any], key: str) -> str:
        if key not in record:
            raise BadRecord(f"no key {key!r} among {list(record)[:8]}; see --json-keys")
        text = record[key]
        if self.render is not None and not isinstance(text, str):
            text = self.render(text)
        if text is None:
            raise BadRecord(f"{key!r} is null")
        if not isinstance(text, str):
            raise BadRecord(f"{key!r} is not a string but a {type(text).__name__}")
        if len(text) > LONGEST_LINE:
            raise BadRecord(f"{key!r} is longer than {LONGEST_LINE} characters")
        return text


def _field(record: Any, path: str) -> str | None:
    """Return a field's value as --filter writes it: as JSON, but strings without quotes; None if
    there is no such field."""
    for name in (path,) if path in record else path.split("."):
        if not isinstance(record, dict) or name not in record:
            return None
        record = record[name]
    if isinstance(record, str):
        return record
    try:
        return orjson.dumps(record, default=str).decode()
    except orjson.JSONEncodeError as error:
        raise BadRecord(f"{path!r} cannot be compared: {error}") from error


@dataclass
class Batch:
    """Some documents, and what was left out among them."""

    texts: list[tuple[str, ...]]
    """For each document, one text per key."""
    rejects: list[Reject] = field(default_factory=list)
    """Records that cannot be used, for the rejects file."""
    blank_lines: int = 0
    """Number of blank lines."""
    filtered: int = 0
    """Number of records that a filter leaves out."""


def read_documents(piece: Piece, wanted: Wanted, seen: InputHash) -> Iterator[Batch]:
    """Yield all documents of a piece, in order.

    Args:
        piece: the part of a file to read.
        wanted: which records to take, and which texts in them.
        seen: hash that the bytes read are added to.

    Raises:
        UserError: the file cannot be read, is truncated or damaged, or has no such column.
    """
    return (
        _read_parquet(piece, wanted, seen)
        if piece.kind == "parquet"
        else _read_json(piece, wanted, seen)
    )


def _read_json(piece: Piece, wanted: Wanted, seen: InputHash) -> Iterator[Batch]:
    before = 0
    first = 0  # the number of the piece's first line, once that is needed
    for lines in read_lines(piece, seen):
        if isinstance(lines, int):
            before += lines
            yield Batch([], blank_lines=lines)
            continue
        batch = _parse_at_once(lines, wanted)
        if batch is None:
            batch = _parse_each(piece.path, before, lines, wanted)
            if batch.rejects and not first:
                first = first_line_number(piece)  # reads everything before the piece
            for reject in batch.rejects:
                reject.line += first
        before += len(lines)
        yield batch


def _parse_at_once(lines: list[bytes | None], wanted: Wanted) -> Batch | None:
    """Parse lines in one go; return None if anything is wrong with one of them."""
    try:
        texts = [wanted.texts(orjson.loads(line)) for line in lines]  # type: ignore[arg-type]
    except (orjson.JSONDecodeError, BadRecord):
        return None
    kept = [text for text in texts if text is not None]
    return Batch(kept, filtered=len(texts) - len(kept))


def _parse_each(path: str, number: int, lines: list[bytes | None], wanted: Wanted) -> Batch:
    batch = Batch([])
    for at, line in enumerate(lines, number):
        if line is not None and not line.strip():
            batch.blank_lines += 1
            continue
        try:
            if line is None:
                raise BadRecord(f"longer than {LONGEST_LINE} bytes")
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise BadRecord(f"not JSON: {error.msg}: byte {error.pos + 1}") from error
            _add(batch, wanted.texts(record))
        except BadRecord as error:
            content = (line or b"")[:QUARANTINED].decode(errors="backslashreplace")
            batch.rejects.append(Reject(path, at, str(error), content))
    return batch


def _add(batch: Batch, texts: tuple[str, ...] | None) -> None:
    if texts is None:
        batch.filtered += 1
    else:
        batch.texts.append(texts)


def _read_parquet(piece: Piece, wanted: Wanted, seen: InputHash) -> Iterator[Batch]:
    """Yield the documents of a parquet file; its rows count as lines, from 1."""
    number = 1
    for rows in read_rows(piece, wanted.keys, [path for path, _ in wanted.filters], seen):
        yield _parse_rows(piece.path, number, rows, wanted)
        number += len(rows)


def _as_text(row: Row) -> str:
    """Return a row as JSON, with long values cut off."""
    short = row
    if isinstance(row, dict):
        short = {
            name: value[:QUARANTINED] if isinstance(value, str | bytes) else value
            for name, value in row.items()
        }
    try:
        return orjson.dumps(short, default=str).decode(errors="replace")
    except orjson.JSONEncodeError:  # too deep, or a number beyond JSON's
        return repr(short)


def _parse_rows(path: str, number: int, rows: list[Row], wanted: Wanted) -> Batch:
    batch = Batch([])
    for at, row in enumerate(rows, number):
        try:
            if isinstance(row, UnicodeDecodeError):
                raise BadRecord(f"not UTF-8: {row.reason} at byte {row.start + 1}")
            if isinstance(row, Exception):
                raise BadRecord(f"has a value that cannot be read: {row}")
            _add(batch, wanted.texts(row))
        except BadRecord as error:
            content = _as_text(row)[:QUARANTINED]
            batch.rejects.append(Reject(path, at, str(error), content))
    return batch
