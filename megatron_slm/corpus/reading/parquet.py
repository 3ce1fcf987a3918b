"""Read rows of parquet files, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from megatron_slm.corpus.reading.inputs import Piece
from megatron_slm.corpus.reading.lines import BATCH_BYTES, LONGEST_LINE, InputHash
from megatron_slm.errors import UserError

ROWS = 256  # at most, read at a time
COLUMN_BYTES = 1 << 20  # of a column, read at a time
DICTIONARY_PAGE = 2

Row = dict[str, Any] | Exception


def read_rows(
    piece: Piece, keys: Sequence[str], fields: Sequence[str], seen: InputHash
) -> Iterator[list[Row]]:
    """Yield the rows of a file in order, with an exception in place of a row that Python cannot
    represent.

    The file is hashed on the way, in step with its row groups.

    Args:
        piece: the file.
        keys: columns to read.
        fields: further columns, or dotted paths to a field in one; only that field is read.
        seen: hash that the file's bytes are added to.

    Raises:
        UserError: the file is damaged, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    number = 1
    # Neither a whole row group nor a whole column of one is held.
    reading = {"memory_map": False, "pre_buffer": False, "buffer_size": COLUMN_BYTES}
    try:
        with (
            open(piece.path, "rb") as raw,
            open(piece.path, "rb") as headers,
            pyarrow.parquet.ParquetFile(piece.path, **reading) as file,
        ):
            present = file.schema_arrow.names
            roots = [path if path in present else path.split(".")[0] for path in fields]
            for key in (*keys, *roots):
                if key not in present:
                    raise UserError(
                        f"{piece.path} has no column {key!r}, but {present}; see --json-keys"
                    )
            groups = file.num_row_groups
            for group in range(groups):
                rows = _rows_at_once(file.metadata.row_group(group), headers, {*keys, *roots})
                columns = list(dict.fromkeys([*keys, *fields]))
                for table in file.iter_batches(rows, row_groups=[group], columns=columns):
                    yield _in_python(table)
                    number += table.num_rows
                end = piece.size * (group + 1) // groups
                while raw.tell() < end and (chunk := raw.read(BATCH_BYTES)):
                    seen.update(chunk)
            while chunk := raw.read(BATCH_BYTES):
                seen.update(chunk)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise UserError(
            f"{piece.path} cannot be read as parquet, at row {number} or after: "
            f"{(str(error) or 'not enough memory').splitlines()[0]}"
        ) from error


def _rows_at_once(group: Any, headers: BinaryIO, roots: set[str]) -> int:
    """Return how many rows take little memory even if all have the largest value there is.

    A dictionary of a few kilobytes can stand for terabytes of rows.
    """
    largest = 1
    for at in range(group.num_columns):
        chunk = group.column(at)
        if chunk.path_in_schema in roots or chunk.path_in_schema.split(".")[0] in roots:
            average = chunk.total_uncompressed_size // max(1, chunk.num_values)
            largest = max(largest, average, _dictionary_bytes(chunk, headers))
    return max(1, min(ROWS, LONGEST_LINE // largest))


def _dictionary_bytes(chunk: Any, headers: BinaryIO) -> int:
    """Return the size of a column's dictionary, by the first two fields of its page header in
    Thrift's compact form; 0 if it has none."""
    headers.seek(
        min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
    )
    header = iter(headers.read(16))
    values: list[int] = []
    while next(header, None) == 0x15 and len(values) < 2:  # the next field, an i32
        zigzag = shift = 0
        for byte in header:
            zigzag |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        values.append(zigzag >> 1 ^ -(zigzag & 1))
    return values[1] if len(values) == 2 and values[0] == DICTIONARY_PAGE else 0


def _in_python(table: Any) -> list[Row]:
    """Return rows as dictionaries.

    A value that is not UTF-8, or a time that Python has no type for, only affects its own row.
    """
    try:
        found: list[Row] = table.to_pylist()
    except (ValueError, OverflowError):
        found = []
        for at in range(table.num_rows):
            try:
                found += table.slice(at, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                found.append(error)
    return found
