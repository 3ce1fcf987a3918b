"""Turn files of values into a score cache by document, after checking them against the dataset.

Everything is read into a spool first, so that a fault anywhere leaves no cache.  Values by
character come to the tokens by the bytes of the document's text (corpus/tokenizers/token_bytes.py):

- losses (reference) are sums over their spans, and are brought over as those of another tokenizer;
  white space outside of spans counts for the span after it;
- external values are averaged over the bytes of a token that spans cover;
- a mask's tokens are 0 where a span of 0 touches them, and 1 where only spans of 1 do.
"""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.tokenizers.alignment import Floats, align, ends_of_spans
from megatron_slm.corpus.tokenizers.token_bytes import Text, TokenBytes
from megatron_slm.corpus.tokenizers.tokenizer_file import open_tokenizer
from megatron_slm.data.score_cache import LARGEST_UINT16, LEAST, missing_shards
from megatron_slm.errors import UserError
from megatron_slm.files import leftovers, make_directory, sha256_of, temporary
from megatron_slm.jobs.outside.command_line import LARGEST, MUST_BE
from megatron_slm.jobs.outside.documents import (
    DatasetDocuments,
    begin_cache,
    missing_of,
    open_documents,
    open_run_tokenizer,
    shard_span,
    write_values,
)
from megatron_slm.jobs.outside.value_files import (
    RecordPlace,
    Spans,
    ValueRecord,
    check_tokens,
    read_records,
)

SPOOL = "values"  # name of the file that values are collected in


def import_scores(args: Namespace) -> None:
    """Import the values that the command line names.

    Raises:
        UserError: a file is malformed, or is not of this dataset.
    """
    tokenizer = open_run_tokenizer(args)
    (documents,) = open_documents(args.data_path, tokenizer)
    pieces = None if tokenizer.model is None else TokenBytes(open_tokenizer(tokenizer.model))
    rules = Rules(args.kind, args.default, pieces)
    directory = Path(args.slm_reference_cache)
    with _spool(directory, documents.tokens) as values:
        _fill(values, documents, args.file, rules)
        digest = hashlib.sha256("".join(sha256_of(Path(each)) for each in args.file).encode())
        origin = {"imported": digest.hexdigest(), "default": str(args.default)}
        changes = {} if args.kind == "reference" else {"values": args.kind}
        manifest = begin_cache(args, [documents], tokenizer, origin, **changes)
        for _, shard in missing_of(missing_shards(directory, manifest), [documents]):
            start, stop = shard_span(manifest, documents.name, shard, documents.tokens)
            part = np.asarray(values[start:stop])
            write_values(directory, manifest, documents, shard, part, tokenizer.eod)
        capped = _count_above(values, LARGEST_UINT16) if manifest.dtype == "uint16" else 0
    if capped:
        print(
            f"> {capped:,} losses above {LARGEST_UINT16:.2f} nats became that, the most that "
            "uint16 holds; --cache-dtype float32 keeps them"
        )
    print(f"> {directory} is complete: {len(documents):,} documents, {documents.tokens:,} tokens")


def _count_above(values: NDArray[np.float32], most: float) -> int:
    """Return how many values are above a number, in memory that does not grow with them."""
    starts = range(0, len(values), 1 << 20)
    return sum(int(np.count_nonzero(values[at : at + (1 << 20)] > most)) for at in starts)


@contextmanager
def _spool(directory: Path, tokens: int) -> Iterator[NDArray[np.float32]]:
    """Yield room for a value of each token, on the disk; what is left of it is removed."""
    before = directory.exists()
    make_directory(directory, "--slm-reference-cache")
    path = temporary(directory / SPOOL)
    try:
        try:
            for left in leftovers(directory / SPOOL):  # of an import that was killed
                left.unlink(missing_ok=True)
            shape = (max(1, tokens),)
            with path.open("wb") as file:  # writing to a map of what finds no room ends the process
                os.posix_fallocate(file.fileno(), 0, shape[0] * np.float32().nbytes)
            values = np.memmap(path, np.float32, "r+", shape=shape)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        yield values
    finally:
        path.unlink(missing_ok=True)
        if not before:
            with suppress(OSError):  # it is not empty if the cache is there
                directory.rmdir()


def _fill(
    values: NDArray[np.float32], documents: DatasetDocuments, files: list[str], rules: Rules
) -> None:
    seen = np.zeros(len(documents), bool)
    for place, record in read_records(files):
        if place.document >= len(documents):
            raise place.error(
                "document", f"the dataset {documents.prefix} has {len(documents)} documents"
            )
        if seen[place.document]:
            raise place.error("document", "it has values already")
        seen[place.document] = True
        ids = documents.ids(place.document)
        check_tokens(place, record, ids)
        start, stop = documents.starts[place.document : place.document + 2]
        values[start:stop] = rules.values(place, record, ids)
    if not seen.all():
        first = int(np.flatnonzero(~seen)[0])
        if rules.default is None:
            raise UserError(
                f"{', '.join(files)}: document {first}: no values of it, nor of "
                f"{int((~seen).sum()) - 1} others; --default X gives them one"
            )
        for number in np.flatnonzero(~seen).tolist():
            values[documents.starts[number] : documents.starts[number + 1]] = rules.default


@dataclass(frozen=True)
class Rules:
    """How the values of a record become those of tokens."""

    kind: str
    """reference, external or mask."""
    default: float | None
    """Value of tokens that a record says nothing of."""
    pieces: TokenBytes | None
    """The tokenizer's tokens; None if they are mere numbers."""

    def values(self, place: RecordPlace, record: ValueRecord, ids: NDArray[np.int64]) -> Floats:
        """Return the value of each of a document's tokens [n].

        Raises:
            UserError: one has none, or one that its kind cannot have.
        """
        text = self._text(place, record, ids)
        if record.values is not None:
            field, found = "values", np.array(record.values, np.float64)
        elif record.token_spans is not None:
            field = "token_spans"
            self._check_spans(place, field, record.token_spans, len(ids))
            everything = np.arange(1, len(ids) + 1, dtype=np.int64)
            found = self._spread(record.token_spans, everything, np.zeros(len(ids), bool))
        else:
            field, spans = "spans", record.spans or []
            assert text is not None
            self._check_spans(place, field, spans, len(text.character_ends) - 1)
            found = self._by_characters(spans, text)
        return self._complete(place, field, found)

    def _text(self, place: RecordPlace, record: ValueRecord, ids: NDArray[np.int64]) -> Text | None:
        if record.spans is None and record.text is None:
            return None
        if self.pieces is None:
            field = "spans" if record.text is None else "text"
            raise place.error(field, "NullTokenizer's tokens have no text; give token_spans")
        text = self.pieces.text(ids)
        if record.text is not None and record.text != text.characters:
            own, given = text.characters, record.text
            at = next((n for n, (a, b) in enumerate(zip(own, given, strict=False)) if a != b), None)
            at = min(len(own), len(given)) if at is None else at
            raise place.error(
                "text",
                f"{given[at : at + 20]!r} at character {at}, but the dataset's tokens say "
                f"{own[at : at + 20]!r}",
            )
        return text

    def _check_spans(self, place: RecordPlace, field: str, spans: Spans, size: int) -> None:
        before = 0
        for at, (start, stop, _) in enumerate(spans):
            if not start <= stop <= size:
                raise place.error(
                    f"{field}[{at}]", f"from {start} to {stop}, but the document ends at {size}"
                )
            if start < before:
                raise place.error(f"{field}[{at}]", "it begins before the one before it")
            before = start

    def _by_characters(self, spans: Spans, text: Text) -> Floats:
        sized = ~text.special
        ends = text.ends[sized]
        found = np.full(len(text.ends), np.nan)
        if self.kind == "reference":
            found[sized] = _sums(spans, text, ends)
        else:
            at = text.character_ends
            in_bytes = [(int(at[first]), int(at[last]), number) for first, last, number in spans]
            found[sized] = self._spread(in_bytes, ends, np.diff(ends, prepend=0) == 0)
        return found

    def _spread(self, spans: Spans, ends: NDArray[np.int64], empty: NDArray[np.bool_]) -> Floats:
        """Return the values of tokens that end at `ends`, from spans in the same unit.

        Args:
            empty: tokens that no span can touch.
        """
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        total, weight = np.zeros(len(ends)), np.zeros(len(ends))
        least = np.full(len(ends), np.inf)
        for first, last, number in spans:
            if number is None or first == last:
                continue
            begin = int(np.searchsorted(ends, first, side="right"))
            end = int(np.searchsorted(starts, last, side="left"))
            touched = slice(begin, end)
            covered = np.minimum(ends[touched], last) - np.maximum(starts[touched], first)
            shared = number * (covered if self.kind != "reference" else covered / (last - first))
            total[touched] += shared
            weight[touched] += covered
            least[touched] = np.minimum(least[touched], number)
        known = (weight > 0) & ~empty
        total[known] /= weight[known] if self.kind == "external" else 1.0
        return np.where(known, least if self.kind == "mask" else total, np.nan)

    def _complete(self, place: RecordPlace, field: str, found: Floats) -> Floats:
        """Give tokens without a value the default, and check that all are of the kind."""
        lacking = np.isnan(found)
        if self.default is not None:
            found[lacking] = self.default
        elif self.kind == "reference" and not lacking.all() and field == "spans":
            found[lacking] = found[~lacking].mean()
        elif lacking.any():
            first = int(np.flatnonzero(lacking)[0])
            raise place.error(field, f"no value of token {first}; --default X gives it one")
        finite = np.abs(found) <= LARGEST  # sums over spans may not be, where the numbers are
        possible = {
            "reference": finite & (found >= LEAST),
            "external": finite,
            "mask": (found == 0.0) | (found == 1.0),
        }[self.kind]
        if not possible.all():
            at = int(np.flatnonzero(~possible)[0])
            raise place.error(field, f"{found[at]:g} of token {at} is not {MUST_BE[self.kind]}")
        return found


def _sums(spans: Spans, text: Text, ends: NDArray[np.int64]) -> Floats:
    """Bring losses over spans of characters to tokens that end at `ends`; NaN where none is."""
    pieces: list[tuple[int, int, float]] = []
    at = 0
    for first, last, number in [*spans, (len(text.characters), len(text.characters), None)]:
        gap = text.characters[at:first]
        if gap.strip():
            pieces.append((at, first, np.nan))
        pieces.append((first, last, np.nan if number is None else number))
        at = max(at, last)
    if pieces[-1][0] == pieces[-1][1]:  # the end of the text
        pieces.pop()
    if not pieces or not len(text.content):
        return np.full(len(ends), np.nan)
    given = np.array([(first, last) for first, last, _ in pieces], np.int64)
    starts, stops = text.character_ends[given].T
    losses: NDArray[Any] = np.array([number for _, _, number in pieces], np.float64)
    return align(ends, ends_of_spans(starts, stops, len(text.content))).bring(losses)
