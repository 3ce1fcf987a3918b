"""Read lines from plain, gzip and zstd files in batches of bounded size, and hash what is read.

A file that ends in the middle of a compressed stream is an error here; the file objects of
zstandard and gzip do not always raise one.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_slm.corpus.reading.inputs import Piece
from megatron_slm.errors import UserError

COMPRESSED_BYTES = 1 << 12  # read at a time; one repeated byte expands them 30,000 times
BATCH_BYTES = 1 << 20
LONGEST_LINE = 1 << 26

Advance = Callable[[int], None]
# None stands for a line of more than LONGEST_LINE bytes.  A number stands for so many blank lines,
# since a few kilobytes can unpack to billions of them.
Lines = list[bytes | None] | int


class InputHash:
    """SHA-256 of the bytes that a task has read of a piece; `advance` is told how many."""

    def __init__(self, advance: Advance) -> None:
        self.digest = hashlib.sha256()
        self.advance = advance

    def update(self, data: bytes) -> None:
        self.digest.update(data)
        self.advance(len(data))


def read_lines(piece: Piece, seen: InputHash) -> Iterator[Lines]:
    """Yield the lines that begin in the piece, in batches of about BATCH_BYTES, without their ends.

    Raises:
        UserError: the file cannot be read, is truncated, or is damaged.
    """
    try:
        yield from _split(_chunks(piece, seen))
    except OSError as error:
        raise UserError(f"cannot read {piece.path}: {error.strerror or error}") from error


def first_line_number(piece: Piece) -> int:
    """Return the number, from 1, of the first line that begins in a piece."""
    if piece.start == 0:
        return 1
    count, left = 0, piece.start - 1
    with open(piece.path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, BATCH_BYTES))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + 2


def hash_piece(piece: Piece) -> str:
    """Return the hash that InputHash has once all of a piece is read."""
    seen = InputHash(lambda _: None)
    if piece.kind == "jsonl":
        for _ in _range(piece, seen):
            pass
    else:
        with open(piece.path, "rb") as file:
            while chunk := file.read(BATCH_BYTES):
                seen.update(chunk)
    return seen.digest.hexdigest()


def _split(chunks: Iterator[bytes]) -> Iterator[Lines]:
    lines: list[bytes | None] = []
    size = 0
    partial: list[bytes] = []  # of the line that is not complete yet
    partial_size = 0
    for chunk in _cut(chunks):
        if partial_size < BATCH_BYTES and chunk.isspace() and not b"".join(partial).strip():
            if lines:
                yield lines
                lines, size = [], 0
            blank = chunk.count(b"\n")
            if blank:
                yield blank
                partial, partial_size = [], 0
            rest = chunk[chunk.rfind(b"\n") + 1 :]
            partial.append(rest)
            partial_size += len(rest)
            continue
        *ended, rest = chunk.split(b"\n")
        if ended:
            if partial_size + len(chunk) > LONGEST_LINE:
                lines += _without_long(b"".join(partial), partial_size, ended)
            else:
                lines.append(b"".join((*partial, ended[0])))
                lines += ended[1:]
            size += partial_size + len(chunk)
            partial, partial_size = [], 0
        partial_size += len(rest)
        if partial_size <= LONGEST_LINE:
            partial.append(rest)
        if size >= BATCH_BYTES:
            yield lines
            lines, size = [], 0
    if partial_size:
        lines.append(b"".join(partial) if partial_size <= LONGEST_LINE else None)
    if lines:
        yield lines


def _cut(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield chunks of at most BATCH_BYTES, which as single lines take little memory."""
    for chunk in chunks:
        if len(chunk) <= BATCH_BYTES:
            yield chunk
        else:
            for start in range(0, len(chunk), BATCH_BYTES):
                yield chunk[start : start + BATCH_BYTES]


def _without_long(partial: bytes, partial_size: int, ended: list[bytes]) -> list[bytes | None]:
    """Return the lines that a chunk ends, with None for those that are too long."""
    first = partial + ended[0] if partial_size + len(ended[0]) <= LONGEST_LINE else None
    return [first, *(line if len(line) <= LONGEST_LINE else None for line in ended[1:])]


def _chunks(piece: Piece, seen: InputHash) -> Iterator[bytes]:
    if piece.kind == "jsonl":
        yield from _range(piece, seen)
    elif piece.kind == "gzip":
        yield from _decompressed(piece, seen, lambda: zlib.decompressobj(31), zlib.error)
    else:
        import zstandard

        window = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        yield from _decompressed(piece, seen, window.decompressobj, zstandard.ZstdError)


def _range(piece: Piece, seen: InputHash) -> Iterator[bytes]:
    """Yield the bytes from the first line that begins in the range to the end of the last."""
    with open(piece.path, "rb") as file:
        skipping = piece.start > 0
        file.seek(piece.start - 1 if skipping else 0)
        previous = file.read(1) if skipping else b"\n"
        skipping = previous != b"\n"
        at = piece.start
        while at < piece.end and (chunk := file.read(min(BATCH_BYTES, piece.end - at))):
            at += len(chunk)
            seen.update(chunk)
            if skipping:
                newline = chunk.find(b"\n")
                if newline < 0:
                    continue
                chunk, skipping, previous = chunk[newline + 1 :], False, b"\n"
            if chunk:
                yield chunk
                previous = chunk[-1:]
        if at < piece.end:
            raise UserError(f"{piece.path} became shorter while it was read")
        while not skipping and previous != b"\n" and (chunk := file.readline(BATCH_BYTES)):
            seen.digest.update(chunk)
            previous = chunk[-1:]
            yield chunk


def _decompressed(
    piece: Piece,
    seen: InputHash,
    new_stream: Callable[[], Any],
    damaged: type[Exception],
) -> Iterator[bytes]:
    """Yield the decompressed bytes of all members or frames of a file."""
    stream: Any = None
    with open(piece.path, "rb") as file:
        while compressed := file.read(COMPRESSED_BYTES):
            seen.update(compressed)
            while compressed:
                if stream is None:
                    compressed = compressed.lstrip(b"\0")  # tar pads with zeros
                    if not compressed:
                        break
                    stream = new_stream()
                try:
                    chunk = stream.decompress(compressed)
                except (damaged, MemoryError) as error:
                    where = f"before byte {file.tell()}"
                    if isinstance(error, MemoryError) or "memory" in str(error):
                        raise UserError(
                            f"{piece.path} takes more memory to unpack than there is, {where}: run "
                            "with fewer --workers"
                        ) from error
                    raise UserError(
                        f"{piece.path} is damaged, {where}: {error}; fetch it again"
                    ) from error
                compressed = b""
                if stream.eof:
                    compressed = stream.unused_data
                    stream = None
                if chunk:
                    yield chunk
    if stream is not None:
        raise UserError(
            f"{piece.path} is truncated: its {piece.kind} stream has no end after {piece.size} "
            "bytes; fetch it again"
        )
