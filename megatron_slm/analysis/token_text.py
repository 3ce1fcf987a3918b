"""Show tokens as text: line ends are visible, and nothing in a token can affect the page.

A token need not be text.  Parts of a character (byte fallback, byte-level BPE), control characters
and characters that change the direction of the text are shown as their numbers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable

from megatron_slm.corpus.tokenizers.byte_pieces import BYTE_LEVEL, BYTE_PIECE, REPLACEMENT
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile, open_tokenizer
from megatron_slm.data.token_dump import TokenDump
from megatron_slm.errors import UserError

# Unicode's categories of controls, formats, surrogates, private-use and unassigned characters, and
# of the separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def show(text: str) -> str:
    """Make a text safe and visible on a page that preserves white space: mark line ends and tabs,
    and replace hidden characters by their numbers."""
    return "".join(_show(character) for character in text)


def _show(character: str) -> str:
    match character:
        case "\n":
            return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"
        case "\t":
            return "\N{RIGHTWARDS ARROW}\t"
    if unicodedata.category(character) in HIDDEN:
        return f"\u27e8{ord(character):04X}\u27e9"
    return character


def _show_bytes(content: bytes) -> str:
    return "".join(f"\u27e8{byte:02X}\u27e9" for byte in content)


def token_texts(tokenizer: TokenizerFile | None, ids: Iterable[int]) -> list[str]:
    """Return the text to show for each token id: the id itself if there is no tokenizer or the
    tokenizer does not have it."""
    decode = _numbers if tokenizer is None else DECODERS[tokenizer.kind](tokenizer)
    size = 0 if tokenizer is None else tokenizer.vocab_size
    return [decode(number) if 0 <= number < size else _numbers(number) for number in ids]


def dump_tokenizer(dumps: list[TokenDump], given: str | None) -> TokenizerFile | None:
    """Open the tokenizer of a run's dumps.

    Args:
        dumps: dumps that name the tokenizer of their run.
        given: tokenizer to open instead.

    Returns:
        The tokenizer; None if the run had none, so that tokens are mere numbers.

    Raises:
        UserError: the tokenizer is no longer where it was.
    """
    if given is not None:
        return open_tokenizer(given)
    model = dumps[0].about.tokenizer_model if dumps else None
    if model is None:
        return None
    try:
        return open_tokenizer(model)
    except UserError as error:
        raise UserError(f"{error}; name the run's tokenizer with --tokenizer-model") from error


def _numbers(number: int) -> str:
    return f"\u27e8{number}\u27e9"


def _sentencepiece(tokenizer: TokenizerFile) -> Callable[[int], str]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)

    def decode(number: int) -> str:
        piece = pieces.id_to_piece(number)
        if byte := BYTE_PIECE.fullmatch(piece):
            return _of_bytes(bytes.fromhex(byte[1]))
        return show(piece.replace("\u2581", " "))

    return decode


def _hugging_face(tokenizer: TokenizerFile) -> Callable[[int], str]:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_str(tokenizer.content.decode())

    def decode(number: int) -> str:
        piece = loaded.id_to_token(number)
        if piece is None:
            return _numbers(number)
        if byte := BYTE_PIECE.fullmatch(piece):
            return _of_bytes(bytes.fromhex(byte[1]))
        if loaded.decoder is None:
            return show(piece)
        # Decode it after another token, since decoders strip the space from the first.
        text = loaded.decoder.decode(["x", piece])
        if text.startswith("x") and REPLACEMENT not in text:
            return show(text[1:])
        if all(character in BYTE_LEVEL for character in piece):
            return _of_bytes(bytes(BYTE_LEVEL[character] for character in piece))
        return show(piece)

    return decode


def _tekken(tokenizer: TokenizerFile) -> Callable[[int], str]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    loaded = Tekkenizer.from_file(tokenizer.path)

    def decode(number: int) -> str:
        if number < loaded.num_special_tokens:
            return show(loaded.id_to_piece(number))
        return _of_bytes(loaded.id_to_byte_piece(number))

    return decode


def _of_bytes(content: bytes) -> str:
    try:
        return show(content.decode())
    except UnicodeDecodeError:
        return _show_bytes(content)


DECODERS = {
    "sentencepiece": _sentencepiece,
    "hugging-face": _hugging_face,
    "tekken": _tekken,
}
