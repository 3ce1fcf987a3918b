"""Cut what a model scores into passages, and bring its losses to the documents' own tokens.

A model with the run's tokenizer reads the dataset's tokens themselves, in the windows of
tools/score_reference.py --by document.  Any other model reads each document's text by its own
tokenizer, alone, after its token for the beginning of a text (if it has none, after that for the
end of one), and then its token for the end of a text.  A document longer than the model reads at
once is cut; a model that reads token ids has the token before the cut as context.

Losses come to the documents' tokens by the bytes they share (corpus/tokenizers/alignment.py), that
of the end of the text to the end-of-document token.  Tokens that get none this way (other special
tokens, and segments with a token that the model cannot score) get the mean of their document, or 0
where no token has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.tokenizers.alignment import Floats, align
from megatron_slm.corpus.tokenizers.token_bytes import Text, TokenBytes
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile
from megatron_slm.errors import UserError

LARGEST_LOSS = 1e4  # nats; vLLM says 9999 where a probability is 0
ROUNDING = 1e-3  # nats that a loss may be below 0
SPARED = 8  # tokens of room for what a text that was cut may have more, and for a server's own


@dataclass(frozen=True)
class Passage:
    """Tokens that a model scores in one pass."""

    ids: NDArray[np.int64]
    """[n], the tokens to score."""
    before: int | None
    """The token before them; None if there is none, so that the first has no loss."""
    text: str | None = None
    """What they say, for servers that take text alone."""
    place: str = ""
    """Where they are from, for errors."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens with the one before them."""
        return self.ids if self.before is None else np.append(self.before, self.ids)

    def check(self, losses: Floats, scorer: str) -> None:
        """Check losses of the tokens [n]; only a first token with none before it may lack one.

        Raises:
            UserError: another token has none, or one that no model gives.
        """
        wrong = ~((losses >= -ROUNDING) & (losses <= LARGEST_LOSS))
        if self.before is None and len(losses):
            wrong[0] &= not np.isnan(losses[0])
        if wrong.any():
            at = int(wrong.argmax())
            said = "none" if np.isnan(losses[at]) else f"{losses[at]:.6g}"
            raise UserError(
                f"{scorer} gives token {at} of {len(losses)} of a passage of {self.place} no "
                f"usable loss, but {said}"
            )


class Scorer(Protocol):
    """A model outside Megatron."""

    takes_text: bool
    """Whether it reads text and not token ids."""

    def losses(self, passages: Sequence[Passage]) -> list[Floats]:
        """Return the losses of each passage's tokens [n] in nats; NaN where there is none."""


class ModelTokenizer:
    """The tokenizer of a model outside Megatron.

    Raises:
        UserError: it is not one of Hugging Face's fast tokenizers.
    """

    def __init__(self, file: TokenizerFile) -> None:
        if file.kind != "hugging-face":
            raise UserError(
                f"--model-tokenizer {file.path} is a {file.kind} tokenizer; give a directory that "
                "transformers reads, or a tokenizer.json"
            )
        from tokenizers import Tokenizer

        self.file = file
        self.fast = Tokenizer.from_str(file.content.decode())
        self.fast.no_truncation()
        self.fast.no_padding()
        self.fast.encode_special_tokens = True  # what looks like one in a text is text
        self.pieces: TokenBytes | None = None
        with suppress(UserError):  # then its tokens say which characters they stand for
            self.pieces = TokenBytes(file)

    def is_of(self, own: TokenBytes) -> bool:
        """Return whether it has the tokens of another tokenizer, with the same numbers."""
        return self.pieces is not None and self.pieces.pieces == own.pieces

    @property
    def beginning(self) -> int | None:
        """The token after which the model reads a text; None if it has none."""
        return self.file.eod if self.file.bos is None else self.file.bos

    def encode(self, text: str) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Return a text's token ids [n], and the characters that each stands for."""
        found = self.fast.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int64), found.offsets

    def ends(
        self, text: Text, ids: NDArray[np.int64], spans: list[tuple[int, int]]
    ) -> NDArray[np.int64]:
        """Return the byte of a text at which each of its tokens [n] ends.

        That is known exactly where the tokens' own bytes are the text.  Otherwise (a normaliser
        changed the text, or it was cut) it is taken from their characters.
        """
        if self.pieces is not None:
            said = self.pieces.text(ids)
            if said.content == text.content:
                return said.ends
        return text.ends_of(spans)


@dataclass
class Counts:
    """What became of the tokens of the documents that were scored by text."""

    tokens: int = 0
    """Tokens with text."""
    one_to_one: int = 0
    """Those among them that the model's tokenizer has, too."""
    filled: int = 0
    """Tokens of any kind that got their document's mean."""


@dataclass
class ByText:
    """Scores documents by their text, with a model of another tokenizer."""

    scorer: Scorer
    own: TokenBytes
    """The tokens of the datasets."""
    eod: int
    """The datasets' end-of-document token."""
    tokenizer: ModelTokenizer
    """The model's tokenizer."""
    length: int
    """Tokens that the model reads at once."""
    counts: Counts = field(default_factory=Counts)

    def losses(self, documents: Sequence[NDArray[Any]], places: Sequence[str]) -> list[Floats]:
        """Return the losses of each document's tokens, in nats.

        Args:
            documents: the token ids of each, [n].
            places: what each is called in errors.
        """
        texts = [self.own.text(ids) for ids in documents]
        encoded = [self._passages(*each) for each in zip(texts, places, strict=True)]
        scored = iter(self.scorer.losses([each for passages, _ in encoded for each in passages]))
        found = []
        for ids, text, (passages, ends) in zip(documents, texts, encoded, strict=True):
            parts = [next(scored) for _ in passages]
            given = np.concatenate(parts) if parts else np.zeros(0)
            found.append(self._bring(ids, text, given[: len(ends)], ends, given[len(ends) :]))
        return found

    def _bring(
        self,
        ids: NDArray[Any],
        text: Text,
        given: Floats,
        ends: NDArray[np.int64],
        end: Floats,
    ) -> Floats:
        alignment = align(text.ends[~text.special], ends)
        values = np.full(len(ids), np.nan)
        values[~text.special] = alignment.bring(given)
        if len(end) and len(ids) and ids[-1] == self.eod:
            values[-1] = end[0]
        lacking = np.isnan(values)
        self.counts.tokens += int((~text.special).sum())
        self.counts.one_to_one += alignment.one_to_one
        self.counts.filled += int(lacking.sum())
        values[lacking] = 0.0 if lacking.all() else values[~lacking].mean()
        return values

    def _passages(self, text: Text, place: str) -> tuple[list[Passage], NDArray[np.int64]]:
        """Cut a document's text.

        Returns:
            The passages; and [m] the byte of the text at which each of their tokens ends, but for a
            last token that ends the text for the model.
        """
        if self.scorer.takes_text:
            return self._cut_text(text, place)
        ids, spans = self.tokenizer.encode(text.characters)
        stop = self.tokenizer.file.eod
        whole = ids if stop is None or not len(ids) else np.append(ids, stop)
        passages, before = [], self.tokenizer.beginning
        for start in range(0, len(whole), self.length):
            passages.append(Passage(whole[start : start + self.length], before, place=place))
            before = int(passages[-1].ids[-1])
        return passages, self.tokenizer.ends(text, ids, spans)

    def _cut_text(self, text: Text, place: str) -> tuple[list[Passage], NDArray[np.int64]]:
        """Cut a text into parts that are each tokenized alone."""
        passages: list[Passage] = []
        spans: list[tuple[int, int]] = []
        for start, part in self._parts(text.characters):
            ids, own = self.tokenizer.encode(part)
            passages.append(Passage(ids, None, part, place))
            spans += [(start + first, start + last) for first, last in own]
        everything = [np.zeros(0, np.int64), *(passage.ids for passage in passages)]
        return passages, self.tokenizer.ends(text, np.concatenate(everything), spans)

    def _parts(self, characters: str) -> Iterator[tuple[int, str]]:
        """Yield parts that the model reads at once, each with its first character's number.

        A part ends before a token that begins with a character, if possible before white space.
        """
        at, most = 0, self.length - SPARED
        while at < len(characters):
            # No token has more characters than this on average, and then it is cut again.
            rest = characters[at : at + 16 * self.length]
            ids, spans = self.tokenizer.encode(rest)
            if not len(ids):
                return
            cut = len(rest) if len(ids) <= most else spans[most][0]
            if cut < len(characters) - at:
                space = rest.rfind(" ", cut // 2, cut)
                cut = space if space > 0 else max(cut, 1)
            yield at, rest[:cut]
            at += cut
