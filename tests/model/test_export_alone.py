"""A trained model exported without the Hugging Face directory that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import numpy
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch import pretrain
from megatron_slm.model.export_hf import export_hugging_face
from megatron_slm.model.import_hf import import_hugging_face
from megatron_slm.model.sentencepiece_json import write_tokenizer_json
from real_text import docstrings

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
VOCABULARY = 32200  # more than the tokenizer's 32000


def write_tokens(prefix: Path, pieces: sentencepiece.SentencePieceProcessor) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for text in docstrings(["argparse", "difflib"]):
        ids = [*pieces.encode(text), pieces.eos_id()]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_vocabulary_and_tokenizer_come_along(tmp_path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(str(SENTENCEPIECE))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    import_hugging_face(tmp_path / "hf", tmp_path / "base", 128)
    write_tokens(tmp_path / "text", pieces)
    arguments = f"""
        --pretrained-checkpoint {tmp_path / "base"} --use-checkpoint-args --slm-changed vocab_size
        --no-use-tokenizer-model-from-checkpoint-args --save {tmp_path / "saved"} --save-interval 1
        --tokenizer-type SentencePieceTokenizer --tokenizer-model {SENTENCEPIECE}
        --data-path {tmp_path / "text"} --split 90,10,0 --seq-length 64 --micro-batch-size 1
        --global-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --eval-interval 9
        --num-workers 0
    """
    pretrain(1, arguments.split(), tmp_path / "run")

    exported = tmp_path / "exported"
    architecture = export_hugging_face(
        tmp_path / "saved" / "iter_0000001", exported, None, None, 10**9
    )
    assert architecture.vocabulary == VOCABULARY
    written = json.loads((exported / "config.json").read_text())
    assert written["vocab_size"] == VOCABULARY
    assert (written["bos_token_id"], written["eos_token_id"]) == (pieces.bos_id(), pieces.eos_id())
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    code = Path(json.__file__).with_name("decoder.py").read_text()
    for text in [code, "", " ", *(f"a{' ' * n}b" for n in range(40)), "\x00 naïve 東京 🎲 ½"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["unigram", "not a model"])
def test_another_tokenizer_gets_no_json(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "other.model"
    if kind == "unigram":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(docstrings(["argparse"])),
            model_prefix=str(model.with_suffix("")),
            vocab_size=300,
            model_type="unigram",
            minloglevel=2,
        )
    else:
        model.write_bytes(b"a tokenizer")
    assert not write_tokenizer_json(model, tmp_path)
    assert not list(tmp_path.glob("*.json"))
