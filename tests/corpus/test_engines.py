"""Engines against the libraries that define the ids, for three kinds of tokenizer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from corpus import MODEL, PIECES, Document, ids_of, preprocess, read_dataset, texts, write_jsonl
from megatron_slm.corpus.tokenizers import engines

TEXTS = texts()
TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a byte-level BPE with a template that puts <s> before each text."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    wrapped = tokenizer_class(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    directory = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(directory)
    return directory


def documents(tmp_path: Path, model: Path, *more: object) -> tuple[list[Document], str]:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = ("--tokenizer-model", model, "--engine", "auto", *more)
    result = preprocess(source, tmp_path / "out", *options)
    return read_dataset(tmp_path / "out_text_document"), result.err


def test_sentencepiece(tmp_path: Path) -> None:
    found, said = documents(tmp_path, MODEL)
    assert found == [ids_of(text, eod=False) for text in TEXTS]
    assert "engine: gigatoken" in said and f"on {len(TEXTS)} documents of this corpus" in said


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
@pytest.mark.parametrize("special", ["text", "ids"])
def test_hugging_face(tmp_path: Path, hugging_face: Path, file: str, special: str) -> None:
    """The ids that Hugging Face's tokenizer gives; </s> in the text is text by default."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(hugging_face)
    found, said = documents(
        tmp_path, hugging_face / file, "--append-eod", "--special-tokens-in-text", special
    )
    as_hf: Any = {"add_special_tokens": False, "split_special_tokens": special == "text"}
    expected = [(*reference.encode(text, **as_hf), 1) for text in TEXTS]
    assert found == expected
    literal = next(document for text, document in zip(TEXTS, found, strict=True) if "</s>" in text)
    assert (literal.count(1) > 1) == (special == "ids")
    assert "engine: " in said


def test_tekken(tmp_path: Path) -> None:
    reference = Tekkenizer.from_file(TEKKEN)
    found, said = documents(tmp_path, TEKKEN)
    assert found == [tuple(reference.encode(text, bos=False, eos=False)) for text in TEXTS]
    assert max(map(max, found)) > 65535, "ids of 32 bits"
    assert "engine: " in said


@pytest.mark.parametrize("fault", ["other ids", "failing", "not installed"])
def test_engines_that_are_not_exact_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A single document of the corpus that comes out otherwise is enough."""
    exact = engines.load_gigatoken

    def load(file: Any, special: bool) -> engines.Encode:
        encode = exact(file, special)

        def spoiled(given: list[str]) -> Any:
            ids, lengths = encode(given)
            if fault == "failing":
                raise RuntimeError("cannot")
            at = given.index(TEXTS[500])
            ids = np.array(ids)
            ids[int(lengths[:at].sum())] += 1
            return ids, lengths

        return spoiled

    if fault == "not installed":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    else:
        monkeypatch.setitem(engines.ENGINES["sentencepiece"], "gigatoken", load)
    found, said = documents(tmp_path, MODEL)
    assert "engine: kitoken" in said and "not gigatoken: " in said
    assert found == [ids_of(text, eod=False) for text in TEXTS]
    if fault == "other ids":
        source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
        options = ("--engine", "gigatoken")
        result = preprocess(source, tmp_path / "two", *options, check=False)
        assert result.code == 2 and "other ids for" in result.err


def test_no_engine_is_taken_on_no_evidence(tmp_path: Path) -> None:
    """No document in what is looked at of an input: the reference it is."""
    lines = [json.dumps({"text": text, "n": 2}) for text in TEXTS]
    padding = json.dumps({"text": "x" * 4000, "n": 1})
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([padding] * 600 + lines))
    result = preprocess(source, tmp_path / "out", "--engine", "auto", "--filter", "n=2")
    assert re.search(r"engine: sentencepiece \S+, the reference: no document", result.err)
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(t, eod=False) for t in TEXTS]


def test_a_run_goes_on_at_a_file_of_bad_lines(tmp_path: Path) -> None:
    """As a run of all at once, which rejects no more than it may."""
    good, bad = write_jsonl(tmp_path / "good.jsonl", TEXTS), tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    options = ("--engine", "auto", "--max-reject-fraction", "0.01", "--shard-size", "1K")
    preprocess(good, tmp_path / "out", *options, "--stage", "tokenize")
    result = preprocess([good, bad], tmp_path / "out", *options)
    assert "1 rejects" in result.out and "the reference: no document" in result.err
    (rejects,) = (tmp_path / "out_rejects").iterdir()
    assert str(bad) in rejects.read_text()


def test_ids_beyond_the_vocabulary_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(file: Any, special: bool) -> engines.Encode:
        return engines.encode_lists(lambda given: [[70_000] for _ in given])

    monkeypatch.setitem(engines.ENGINES["sentencepiece"], "sentencepiece", load)
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    result = preprocess(source, tmp_path / "out", check=False)
    assert result.code == 2 and "70000, beyond its vocabulary of 32000" in result.err
    assert not list(tmp_path.rglob("*.idx"))
    assert PIECES.get_piece_size() == 32000
