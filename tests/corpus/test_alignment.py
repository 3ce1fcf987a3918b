"""Values of one tokenization on the tokens of another, against a computation token by token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from corpus import MODEL, PIECES, ids_of, texts
from megatron_slm.corpus.tokenizers.alignment import align, ends_of_spans
from megatron_slm.corpus.tokenizers.token_bytes import TokenBytes
from megatron_slm.corpus.tokenizers.tokenizer_file import open_tokenizer
from megatron_slm.errors import UserError
from real_text import docstrings

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@st.composite
def two_tokenizations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of the tokens of two tokenizations of as many bytes; some tokens have none."""
    one, other = draw(SIZES), draw(SIZES)
    apart = sum(one) - sum(other)
    (other if apart > 0 else one).append(abs(apart))
    return one, other


def by_hand(one: list[int], other: list[int]) -> list[tuple[list[int], list[int]]]:
    """Tokens of both in each segment: a walk along the bytes that stops where both stop."""
    common = {int(end) for end in np.cumsum(one)} & {int(end) for end in np.cumsum(other)}
    bounds = [0, *sorted(common - {0})]
    return [
        tuple(
            [
                number
                for number, size in enumerate(sizes)
                if first <= sum(sizes[:number]) < last
                or (last == bounds[-1] <= sum(sizes[:number]))
            ]
            for sizes in (one, other)
        )
        for first, last in pairwise(bounds)
    ]


@settings(max_examples=300, deadline=None)
@given(two_tokenizations())
def test_sums_over_segments_are_kept(sizes: tuple[list[int], list[int]]) -> None:
    one, other = sizes
    losses = np.random.default_rng(sum(one)).uniform(0, 10, len(other))
    alignment = align(np.cumsum(one), np.cumsum(other))
    brought = alignment.bring(losses)
    if sum(one) == 0:
        assert np.isnan(brought).all()
        return
    segments = by_hand(one, other)
    assert sorted(number for own, _ in segments for number in own) == list(range(len(one)))
    for own, theirs in segments:
        assert brought[own].sum() == pytest.approx(losses[theirs].sum())
        alike = np.array_equal(np.cumsum(one)[own], np.cumsum(other)[theirs])
        if alike:
            assert np.array_equal(brought[own], losses[theirs])
        else:
            size = sum(one[number] for number in own)
            expected = [losses[theirs].sum() * one[number] / size for number in own]
            assert brought[own] == pytest.approx(expected)
    # A loss that is missing is missing in its whole segment, unless tokens keep their own.
    losses[0] = np.nan
    lacking = np.flatnonzero(np.isnan(alignment.bring(losses))).tolist()
    (segment,) = [own for own, theirs in segments if 0 in theirs]
    assert lacking == (segment[:1] if alignment.partners[segment[0]] == 0 else segment)


@settings(max_examples=200, deadline=None)
@given(SIZES)
def test_the_same_tokenization_is_identity(sizes: list[int]) -> None:
    losses = np.random.default_rng(len(sizes)).uniform(0, 10, len(sizes))
    alignment = align(np.cumsum(sizes), np.cumsum(sizes))
    if sum(sizes):
        assert np.array_equal(alignment.bring(losses), losses)
        assert alignment.one_to_one == len(sizes)


def test_spans() -> None:
    """A shared character counts for the last of its tokens, what is left out for the next."""
    assert ends_of_spans(np.array([0, 0, 1, 4]), np.array([1, 1, 3, 6]), 8).tolist() == [0, 1, 3, 8]
    with pytest.raises(ValueError, match="ends at byte 2, the other at 3"):
        align(np.array([2]), np.array([3]))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that normalizes text, and leaves spaces out of what tokens stand for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(docstrings(["argparse", "difflib"]), trainer)
    path = tmp_path_factory.mktemp("byte-level") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_real_text(byte_level: Path) -> None:
    """Sentencepiece's tokens get all that the other tokenizer's lose, whatever it makes of text."""
    own = TokenBytes(open_tokenizer(str(MODEL)))
    other = Tokenizer.from_file(str(byte_level))
    draw = np.random.default_rng(1)
    hard = ["e\u0301A\u030a NAÏVE \u1100\u1161", "\u2028\ufeff", "ends in a space  "]
    for text in [*texts(), *hard]:
        ids = np.array(ids_of(text))
        said = own.text(ids)
        assert said.content.decode() == text.replace("\u2581", " ")
        assert said.special.tolist() == [False] * (len(ids) - 1) + [True]
        found = other.encode(said.characters)
        losses = draw.uniform(0, 5, len(found.ids))
        brought = align(said.ends[:-1], said.ends_of(found.offsets)).bring(losses)
        assert brought.sum() == pytest.approx(losses.sum())


def test_bytes_that_are_no_text() -> None:
    """Each counts as a character of one byte; the rest of the text keeps its places."""
    own = TokenBytes(open_tokenizer(str(MODEL)))
    ids = [*PIECES.encode("é"), PIECES.piece_to_id("<0xE6>"), *PIECES.encode("é東")]
    said = own.text(np.array([PIECES.bos_id(), *ids]))
    assert said.content == "é".encode() + b"\xe6 " + "é東".encode()
    assert said.characters == "é\ufffd é東"
    assert said.character_ends.tolist() == [0, 2, 3, 4, 6, 9]
    assert said.special.tolist()[0] and said.ends[0] == 0 and said.ends[-1] == 9


def test_the_same_tokenizer(byte_level: Path) -> None:
    """Byte-level tokens stand for the bytes of the text, and added ones that are not special for
    their own letters."""
    definition = json.loads(byte_level.read_text())
    definition["normalizer"] = None
    definition["added_tokens"].append(
        {**definition["added_tokens"][0], "id": 700, "content": "<tab>", "special": False}
    )
    plain = byte_level.with_name("plain.json")
    plain.write_text(json.dumps(definition))
    tokenizer, own = Tokenizer.from_file(str(plain)), TokenBytes(open_tokenizer(str(plain)))
    for text in [*texts()[-4:], "a<tab>b 東🎲"]:
        ids = tokenizer.encode(text).ids
        assert own.text(np.array(ids)).content == text.encode()
    assert own.text(np.array([0])).special.all()


def test_a_decoder_of_another_kind(byte_level: Path) -> None:
    """Transformers reads a Qwen's tokenizer so, even if it is sentencepiece's."""
    definition = json.loads(byte_level.read_text())
    definition["model"]["vocab"]["▁"] = Tokenizer.from_file(str(byte_level)).get_vocab_size()
    mixed = byte_level.with_name("mixed.json")
    mixed.write_text(json.dumps(definition))
    with pytest.raises(UserError, match="its token '▁' has '▁', which stands for no byte"):
        TokenBytes(open_tokenizer(str(mixed)))
