"""Tell which bytes of a document's text each of its tokens stands for.

The text is what the tokens say, so a normaliser that changed the original text has no effect here.
Special tokens (those that begin and end documents, and those of chats) stand for no bytes; the text
on both sides of one is joined.  The space that some tokenizers put before a text is no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_slm.corpus.tokenizers.alignment import ends_of_spans
from megatron_slm.corpus.tokenizers.byte_pieces import BYTE_LEVEL, BYTE_PIECE, REPLACEMENT
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json

_SPACE = "\u2581"  # stands for a space in sentencepiece's tokens


@dataclass(frozen=True)
class Text:
    """The text of a document."""

    content: bytes
    """Its bytes, which need not be UTF-8."""
    ends: NDArray[np.int64]
    """[n], the byte after each of its n tokens; a special token has no bytes."""
    special: NDArray[np.bool_]
    """[n], which tokens are special."""

    @cached_property
    def characters(self) -> str:
        """The text as a tokenizer reads it.

        Each byte that belongs to no character is a replacement character.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError:
            text = self.content.decode(errors="surrogateescape")
            return "".join(REPLACEMENT if "\udc80" <= each <= "\udcff" else each for each in text)

    @cached_property
    def character_ends(self) -> NDArray[np.int64]:
        """[characters + 1], the byte at which each character begins, and the end of the text."""
        text = self.content.decode(errors="surrogateescape")
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        escaped = (codes >= 0xDC80) & (codes <= 0xDCFF)
        sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
        return np.concatenate([[0], np.cumsum(np.where(escaped, 1, sizes))]).astype(np.int64)

    def ends_of(self, spans: list[tuple[int, int]]) -> NDArray[np.int64]:
        """Return the byte at which each token of another tokenization ends.

        Args:
            spans: for each of its tokens the first character, and the one after the last.
        """
        if not spans:
            return np.zeros(0, np.int64)
        starts, stops = self.character_ends[np.asarray(spans, np.int64)].T
        return ends_of_spans(starts, stops, len(self.content))


class TokenBytes:
    """The bytes of each token of a tokenizer.

    Raises:
        UserError: it is of a kind whose tokens do not say their bytes.
    """

    def __init__(self, tokenizer: TokenizerFile) -> None:
        pieces, first = READERS[tokenizer.kind](tokenizer)
        self.pieces = pieces
        """The bytes of each id; None for special tokens."""
        self.leading_space = first[:1] == b" "
        """Whether the tokenizer puts a space before a text."""

    def text(self, ids: NDArray[Any]) -> Text:
        """Return the text of a document's token ids [n].

        Raises:
            UserError: the tokenizer has no such token.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.pieces):
            raise UserError(
                f"token {ids.max()} is not among the tokenizer's {len(self.pieces)}: is "
                "--tokenizer-model the one that the dataset was made with?"
            )
        parts = [self.pieces[number] for number in ids.tolist()]
        special = np.array([part is None for part in parts], bool)
        words = [part or b"" for part in parts]
        at = next((place for place, word in enumerate(words) if word), None)
        if self.leading_space and at is not None:
            words[at] = words[at].removeprefix(b" ")
        ends = np.cumsum([len(word) for word in words], dtype=np.int64)
        return Text(b"".join(words), ends, special)


Pieces = list[bytes | None]


def _sentencepiece(file: TokenizerFile) -> tuple[Pieces, bytes]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=file.content)
    pieces: Pieces = []
    for number in range(model.get_piece_size()):
        if model.is_control(number) or model.is_unknown(number):
            pieces.append(None)
        else:
            pieces.append(_with_spaces(model.id_to_piece(number)))
    return pieces, _first(pieces, model.encode("a"))


def _with_spaces(piece: str) -> bytes:
    if byte := BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace(_SPACE, " ").encode()


class _Definition(msgspec.Struct):
    """The part of a tokenizer.json that says how tokens become bytes."""

    decoder: Any = None


def _hugging_face(file: TokenizerFile) -> tuple[Pieces, bytes]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(file.content.decode())
    decoder = json.dumps(decode_json(file.content, _Definition, file.path).decoder)
    read: Callable[[str], bytes]
    if '"ByteLevel"' in decoder:
        read = _of_byte_level
    elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        read = _with_spaces
    else:
        raise UserError(
            f"{file.path}: its decoder is neither ByteLevel nor of sentencepiece's kind, so its "
            "tokens do not say which bytes they stand for"
        )
    added = tokenizer.get_added_tokens_decoder()
    pieces: Pieces = []
    for number in range(file.vocab_size):
        piece = tokenizer.id_to_token(number)
        if number in added:
            pieces.append(None if added[number].special else added[number].content.encode())
        else:
            try:
                pieces.append(None if piece is None else read(piece))
            except KeyError as error:
                raise UserError(
                    f"{file.path}: its decoder is ByteLevel, and its token {piece!r} has {error}, "
                    "which stands for no byte"
                ) from error
    return pieces, _first(pieces, tokenizer.encode("a", add_special_tokens=False).ids)


def _of_byte_level(piece: str) -> bytes:
    return bytes(BYTE_LEVEL[character] for character in piece)


def _tekken(file: TokenizerFile) -> tuple[Pieces, bytes]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(file.path)
    special = tokenizer.num_special_tokens
    words = range(special, file.vocab_size)
    return [None] * special + [tokenizer.id_to_byte_piece(each) for each in words], b"a"


def _first(pieces: Pieces, ids: list[int]) -> bytes:
    """Return the bytes of the first token of the text "a"."""
    return next((piece for each in ids if (piece := pieces[each])), b"")


READERS: dict[str, Callable[[TokenizerFile], tuple[Pieces, bytes]]] = {
    "sentencepiece": _sentencepiece,
    "hugging-face": _hugging_face,
    "tekken": _tekken,
}
