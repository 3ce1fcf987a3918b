"""Check that a dataset has the ids of the texts that its manifest says it was made from.

Some texts of some shards are tokenized again, by the tokenizer's own library.  The dataset's hash
decides which, so every check looks at the same ones: consecutive texts anywhere in inputs that can
be read from any byte on, otherwise some of the first AMONG documents of a shard.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.reading.chat import chat_renderer
from megatron_slm.corpus.reading.documents import Render, Wanted, read_documents
from megatron_slm.corpus.reading.inputs import Piece, open_piece
from megatron_slm.corpus.reading.lines import InputHash
from megatron_slm.corpus.tokenizers.engines import ENGINES, Encode, load_engine, surround
from megatron_slm.corpus.tokenizers.tokenizer_file import open_tokenizer
from megatron_slm.data.dataset_check import CheckedDataset
from megatron_slm.data.manifest_types import ShardManifest
from megatron_slm.errors import UserError
from megatron_slm.files import sha256_of

DOCUMENTS = 64  # compared in each shard
AMONG = 2048


def check_deeply(
    dataset: CheckedDataset, tokenizer_model: str, chat_template: str | None, shards: int
) -> int:
    """Compare documents of up to `shards` shards, and return how many were compared.

    Args:
        dataset: the dataset, which has passed the quick check.
        tokenizer_model: path of the tokenizer.
        chat_template: path of the chat template; None if the texts are not conversations.
        shards: number of shards to look at.

    Raises:
        UserError: ids differ, the tokenizer or template is another one, there is no manifest, or
            inputs are gone.
    """
    manifest = dataset.manifest
    if manifest is None:
        raise UserError(f"{dataset.prefix} has no manifest, so its texts are not known")
    options = manifest.options
    file = open_tokenizer(tokenizer_model)
    if file.sha256 != options.tokenizer.sha256:
        raise UserError(f"{dataset.prefix} was not made with {tokenizer_model}, but another file")
    render = _renderer(dataset.prefix, options.chat_template, chat_template)
    special = options.special_tokens_in_text == "ids"
    encode = load_engine(list(ENGINES[file.kind])[-1], file, special)
    ends = np.cumsum([shard.output.documents for shard in manifest.shards]).tolist()
    draw = random.Random(manifest.idx.sha256)
    chosen = draw.sample(range(len(ends)), min(shards, len(ends)))
    parts = [
        _Shard(dataset, manifest.shards[at], range(ends[at - 1] if at else 0, ends[at]))
        for at in sorted(chosen)
    ]
    return sum(part.check(render, encode, draw) for part in parts)


def _renderer(prefix: Path, recorded: str | None, template: str | None) -> Render | None:
    """Return the function that applies the chat template; None without one.

    Raises:
        UserError: the template is not the one whose hash the manifest has.
    """
    render = None if template is None else chat_renderer(template)
    if recorded != (None if template is None else sha256_of(Path(template))):
        made = "without a" if recorded is None else "with a" if template is None else "with another"
        raise UserError(f"{prefix} was made {made} chat template: see --chat-template")
    return render


@dataclass(frozen=True)
class _Shard:
    """A part of a dataset that was made from one task."""

    dataset: CheckedDataset
    """The dataset."""
    manifest: ShardManifest
    """Manifest of the shard."""
    documents: range
    """Numbers of its documents in the dataset."""

    def check(self, render: Render | None, encode: Encode, draw: random.Random) -> int:
        """Compare some documents, and return how many were compared."""
        options = self.manifest.options
        gaps = options.dedup is not None or options.decontaminate is not None
        pieces = [
            open_piece(recorded.path, recorded.start, recorded.end)
            for recorded in self.manifest.inputs
        ]
        if gaps or any(piece.kind != "jsonl" for piece in pieces):
            return self._check_first(self._texts(pieces, render, encode), gaps, draw)
        start = draw.randrange(1 + sum(piece.end - piece.start for piece in pieces))
        for part in (_behind(pieces, start), pieces):  # all, if no text begins after it
            texts = list(islice(self._texts(part, render, encode), DOCUMENTS))
            if texts:
                return self._check_consecutive(texts)
        if self.documents:
            raise UserError(f"{self.dataset.prefix}: {self.manifest.name} has no text any more")
        return 0

    def _check_first(self, texts: Iterator[_Text], gaps: bool, draw: random.Random) -> int:
        """Check that documents are the texts of the same numbers.

        If duplicates and contaminated documents were dropped, they need only be texts in the same
        order.
        """
        among = self.documents[:AMONG]
        chosen = sorted(draw.sample(among, min(len(among), DOCUMENTS)))
        numbered = enumerate(texts, self.documents.start)
        for document in chosen:
            for number, text in numbered:
                if (gaps or number == document) and self._has(document, text):
                    break
                if not gaps and number == document:
                    raise self._other(document, text)
            else:
                raise UserError(
                    f"{self.dataset.prefix}: document {document} is not in {self.manifest.name}"
                )
        return len(chosen)

    def _check_consecutive(self, texts: list[_Text]) -> int:
        """Check that the texts are consecutive documents, and return their number."""
        lengths = self.dataset.index.lengths[self.documents.start : self.documents.stop]
        most, first = 0, self.documents.start
        for place in np.flatnonzero(lengths == texts[0].ids.size).tolist():
            found = 0
            for document, text in zip(self.documents[place:], texts, strict=False):
                if not self._has(document, text):
                    break
                found += 1
            if found == len(texts):
                return found
            if found > most:
                most, first = found, self.documents[place]
        if most == 0:
            raise UserError(
                f"{self.dataset.prefix}: no document of {self.manifest.name} has the ids of the "
                f"text in {texts[0].where}"
            )
        raise self._other(first + most, texts[most])

    def _has(self, document: int, text: _Text) -> bool:
        index = self.dataset.index
        data = np.memmap(f"{self.dataset.prefix}.bin", mode="r", dtype=index.dtype)
        start = int(index.offsets[document]) // index.dtype.itemsize
        return np.array_equal(data[start : start + int(index.lengths[document])], text.ids)

    def _other(self, document: int, text: _Text) -> UserError:
        return UserError(
            f"{self.dataset.prefix}: document {document} has other ids than the text in "
            f"{text.where}"
        )

    def _texts(
        self, pieces: Iterable[Piece], render: Render | None, encode: Encode
    ) -> Iterator[_Text]:
        """Yield the texts that have any tokens."""
        options = self.manifest.options
        (key,) = self.manifest.outputs
        keys = tuple(options.json_keys)
        wanted = Wanted(keys, tuple(options.filters), render)
        before, after = (
            () if token is None else (token,) for token in (options.prepend_bos, options.append_eod)
        )
        for piece in pieces:
            for batch in read_documents(piece, wanted, InputHash(lambda _: None)):
                for texts in batch.texts:
                    text = texts[keys.index(key)]
                    ids, lengths = encode([text])
                    if ids.size:
                        where = f"{Path(piece.path)}: {text[:40]!r}"
                        yield _Text(where, surround(ids, lengths, before, after))


@dataclass(frozen=True)
class _Text:
    """A text that was tokenized again."""

    where: str
    """Its file and beginning, for errors."""
    ids: NDArray[Any]
    """[n], its token ids, with those that begin and end a document."""


def _behind(pieces: Iterable[Piece], start: int) -> Iterator[Piece]:
    """Yield the parts of the pieces after their first `start` bytes."""
    for piece in pieces:
        size = piece.end - piece.start
        if start < size:
            yield replace(piece, start=piece.start + max(start, 0))
        start -= size
