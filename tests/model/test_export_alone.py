"""A trained model exported without the Hugging Face directory that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import numpy
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from launch import pretrain
from megatron_slm.errors import UserError
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.conversion.tokenizer_files import copy_tokenizer
from megatron_slm.model.torch_dist import TorchDistReader
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


def test_vocabulary_and_tokenizer_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = sentencepiece.SentencePieceProcessor(str(SENTENCEPIECE))
    config = MistralConfig(
        vocab_size=VOCABULARY,
        sliding_window=None,
        eos_token_id=[pieces.eos_id(), 7],  # one more than the tokenizer has
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "hf")
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

    exported, checkpoint = tmp_path / "exported", tmp_path / "saved" / "iter_0000001"
    architecture = export_hugging_face(checkpoint, exported, None, None, 10**9)
    assert architecture.vocabulary == VOCABULARY
    written = json.loads((exported / "config.json").read_text())
    assert written["vocab_size"] == VOCABULARY
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None)
    assert (written["bos_token_id"], written["eos_token_id"]) == (pieces.bos_id(), [2, 7])
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    code = Path(json.__file__).with_name("decoder.py").read_text()
    for text in [code, "", " ", *(f"a{' ' * n}b" for n in range(40)), "\x00 naïve 東京 🎲 ½"]:
        ids = tokenizer(text)["input_ids"]
        assert ids == pieces.encode(text)
        assert tokenizer.decode(ids) == text

    # With another directory's tokenizer, and with the same.
    for content, says in ((unigram(tmp_path), True), (SENTENCEPIECE.read_bytes(), False)):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        export_hugging_face(checkpoint, tmp_path / f"like {says}", tmp_path / "hf", None, 10**9)
        said = capsys.readouterr().err
        assert (f"--like {tmp_path / 'hf'} has another tokenizer than the run" in said) == says

    # From another directory, where the run's relative name is of nothing, or of something else.
    monkeypatch.chdir(tmp_path)
    common = TorchDistReader(checkpoint).common_state
    common["args"].tokenizer_model = "tokenizer.model"
    torch.save(common, checkpoint / "common.pt")
    export_hugging_face(checkpoint, tmp_path / "without", None, None, 10**9)
    said = capsys.readouterr().err
    assert f"no tokenizer is copied: tokenizer.model is not in {tmp_path}" in said
    written = {path.name for path in (tmp_path / "without").iterdir()}
    assert written == {"config.json", "model.safetensors"}
    for content, message in ((unigram(tmp_path), "another tokenizer"), (b"none", "be read")):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=message):
            export_hugging_face(checkpoint, tmp_path / "wrong", None, None, 10**9)
        assert not (tmp_path / "wrong").exists()
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    export_hugging_face(checkpoint, tmp_path / "right", None, None, 10**9)
    assert (tmp_path / "right" / "tokenizer.json").is_file()


def unigram(directory: Path) -> bytes:
    """Train a sentencepiece model of the unigram kind."""
    model = directory / "unigram.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(docstrings(["argparse"])),
        model_prefix=str(model.with_suffix("")),
        vocab_size=300,
        model_type="unigram",
        minloglevel=2,
    )
    return model.read_bytes()


@pytest.mark.parametrize("name", ["bpe.json", "tekken.json", "other.model"])
def test_a_file_of_another_name(name: str, tmp_path: Path) -> None:
    """It gets the name by which transformers looks for it, if it is what that says."""
    source, target = tmp_path / name, tmp_path / "hf"
    target.mkdir()
    if name == "bpe.json":
        Tokenizer(BPE()).save(str(source))
    else:
        source.write_text('{"vocab": []}')
    copy_tokenizer(source, target)
    (copied,) = target.iterdir()
    assert copied.name == ("tokenizer.json" if name == "bpe.json" else name)
    assert copied.read_bytes() == source.read_bytes()
