"""Documents of a task's pieces: the strings under the wanted keys, batch by batch, and what could
not be used, with file, line and reason.

A batch is parsed in one go; only a batch in which something is wrong is looked at line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_slm.data.inputs import Piece
from megatron_slm.data.lines import (
    BATCH_BYTES,
    LONGEST_LINE,
    InputHash,
    first_line_number,
    read_lines,
)
from megatron_slm.errors import UserError

ROWS = 256  # of a parquet file at a time
COLUMN_BYTES = 1 << 20  # of a column that are read at a time
QUARANTINED = 4096  # bytes of a bad line that are kept

Render = Callable[[Any], str]


class BadRecord(Exception):
    """What is wrong with a record."""


@dataclass(frozen=True)
class Wanted:
    """Which records, and what of them.

    Attributes:
        keys: of the texts; several keys make several datasets.
        filters: (field, value): kept are records whose field, by its dotted path, is that value.
        render: makes a text of what is under the key, unless it is one.
    """

    keys: tuple[str, ...]
    filters: tuple[tuple[str, str], ...] = ()
    render: Render | None = None

    def texts(self, record: Any) -> tuple[str, ...] | None:
        """Texts of a record, or None if a filter leaves it out.

        Raises:
            BadRecord: a key is missing, or what it holds is no text.
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
        return text


def _field(record: Any, path: str) -> str | None:
    """A field as --filter writes it: true and 3.5 as in JSON, strings without quotes."""
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
    """texts: a tuple a document, of one text a key.  rejects: for the rejects file."""

    texts: list[tuple[str, ...]]
    rejects: list[dict[str, Any]] = field(default_factory=list)
    blank_lines: int = 0
    filtered: int = 0


def read_documents(piece: Piece, wanted: Wanted, seen: InputHash) -> Iterator[Batch]:
    """All documents of a piece, in order.

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
    first: int | None = None
    for lines in read_lines(piece, seen):
        batch = _parse_at_once(lines, wanted)
        if batch is None:
            batch = _parse_each(piece.path, before, lines, wanted)
            if batch.rejects and first is None:
                first = first_line_number(piece)  # reads all before the piece
            for reject in batch.rejects:
                reject["line"] += first
        before += len(lines)
        yield batch


def _parse_at_once(lines: list[bytes | None], wanted: Wanted) -> Batch | None:
    """None if any line is not as it should be."""
    try:
        texts = [wanted.texts(orjson.loads(line)) for line in lines]  # type: ignore[arg-type]
    except (orjson.JSONDecodeError, BadRecord):
        return None
    kept = [text for text in texts if text is not None]
    return Batch(kept, filtered=len(texts) - len(kept))


def _parse_each(path: str, number: int, lines: list[bytes | None], wanted: Wanted) -> Batch:
    if None not in lines and not b"".join(lines).strip():  # type: ignore[arg-type]
        return Batch([], blank_lines=len(lines))  # a bomb has them by the billion
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
            batch.rejects.append(_reject(path, at, error, content))
    return batch


def _add(batch: Batch, texts: tuple[str, ...] | None) -> None:
    if texts is None:
        batch.filtered += 1
    else:
        batch.texts.append(texts)


def _reject(path: str, line: int, error: Exception, content: str) -> dict[str, Any]:
    return {"file": path, "line": line, "reason": str(error), "content": content}


def _read_parquet(piece: Piece, wanted: Wanted, seen: InputHash) -> Iterator[Batch]:
    """Rows count as lines, from 1.  The file is hashed by the way, in step with its row groups."""
    import pyarrow
    import pyarrow.parquet

    number = 1
    # Neither a whole row group nor a whole column of one is held.
    reading = {"memory_map": False, "pre_buffer": False, "buffer_size": COLUMN_BYTES}
    try:
        with (
            open(piece.path, "rb") as raw,
            pyarrow.parquet.ParquetFile(piece.path, **reading) as file,
        ):
            present = file.schema_arrow.names
            paths = [path for path, _ in wanted.filters]
            roots = [path if path in present else path.split(".")[0] for path in paths]
            roots = list(dict.fromkeys([*wanted.keys, *roots]))
            for key in roots:
                if key not in present:
                    raise UserError(
                        f"{piece.path} has no column {key!r}, but {present}; see --json-keys"
                    )
            groups = file.num_row_groups
            for group in range(groups):
                for table in file.iter_batches(ROWS, row_groups=[group], columns=roots):
                    yield _parse_rows(piece.path, number, _rows(table), wanted)
                    number += table.num_rows
                end = piece.size * (group + 1) // groups
                while raw.tell() < end and (chunk := raw.read(BATCH_BYTES)):
                    seen.update(chunk)
            while chunk := raw.read(BATCH_BYTES):
                seen.update(chunk)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{piece.path} cannot be read as parquet, at row {number} or after: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _rows(table: Any) -> list[Any]:
    """Rows as dictionaries; UnicodeDecodeError in the place of one that is not UTF-8."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        rows: list[Any] = []
        for at in range(table.num_rows):
            try:
                rows += table.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(error)
        return rows


def _parse_rows(path: str, number: int, rows: list[Any], wanted: Wanted) -> Batch:
    batch = Batch([])
    for at, row in enumerate(rows, number):
        try:
            if isinstance(row, UnicodeDecodeError):
                raise BadRecord(f"not UTF-8: {row.reason} at byte {row.start + 1}")
            _add(batch, wanted.texts(row))
        except BadRecord as error:
            content = orjson.dumps(row, default=str).decode(errors="replace")[:QUARANTINED]
            batch.rejects.append(_reject(path, at, error, content))
    return batch
