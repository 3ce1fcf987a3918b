"""Tokens as they are shown: the text again, and nothing that could act on a page or a reader."""

from __future__ import annotations

import re
import unicodedata

import pytest

from corpus import MODEL, PIECES, texts
from megatron_slm.analysis.token_text import show, token_texts
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile, open_tokenizer

NUMBERS = re.compile("((?:\u27e8[0-9A-F]{2}\u27e9)+)")


def readable(shown: str) -> str:
    """Turn what was shown back into text, with bytes and hidden characters restored."""
    shown = shown.replace("\u21b5\n", "\n").replace("\u2192\t", "\t")
    parts = NUMBERS.split(shown)
    parts[1::2] = [
        bytes.fromhex(re.sub("[\u27e8\u27e9]", "", part)).decode() for part in parts[1::2]
    ]
    return re.sub(
        "\u27e8([0-9A-F]{4,})\u27e9", lambda found: chr(int(found[1], 16)), "".join(parts)
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFile:
    """Train a byte-level tokenizer, of the kind that GPT-2 and Llama 3 have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return open_tokenizer(str(path))


def test_sentencepiece_text_comes_back() -> None:
    # Nothing follows a NUL in sentencepiece.
    text = "\n".join(text for text in texts() if "\x00" not in text)
    shown = token_texts(open_tokenizer(str(MODEL)), PIECES.encode(text))
    assert readable("".join(shown)).removeprefix(" ") == text


def test_byte_level_text_comes_back(byte_level: TokenizerFile) -> None:
    from tokenizers import Tokenizer

    text = "\n".join(texts())
    ids = Tokenizer.from_file(byte_level.path).encode(text).ids
    assert readable("".join(token_texts(byte_level, ids))) == text


def test_what_cannot_be_seen_is_shown_by_number() -> None:
    assert show("a\u202eb\u200b\x00\x1b[31m\u2028") == "a⟨202E⟩b⟨200B⟩⟨0000⟩⟨001B⟩[31m⟨2028⟩"
    tokenizer = open_tokenizer(str(MODEL))
    shown = token_texts(tokenizer, range(-1, tokenizer.vocab_size + 2))
    assert shown[0] == "⟨-1⟩" and shown[-1] == f"⟨{tokenizer.vocab_size + 1}⟩"
    assert shown[1 + PIECES.piece_to_id("<0xE6>")] == "⟨E6⟩"
    assert shown[1 + PIECES.eos_id()] == "</s>"
    assert shown[1 + PIECES.piece_to_id("<0x0A>")] == "↵\n"
    hidden = {c for text in shown for c in text if unicodedata.category(c)[0] == "C"}
    assert hidden <= {"\n", "\t"}


def test_without_a_tokenizer_numbers_are_shown() -> None:
    assert token_texts(None, [7, 0]) == ["⟨7⟩", "⟨0⟩"]
