"""What transformers makes of an exported tokenizer is what training read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoConfig, AutoTokenizer

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.conversion import tokenizer_files
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.torch_dist import TorchDistReader
from random_llama import save_llama, write_random_llama
from real_text import docstrings

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = ["<|im_start|>", "<|im_end|>", "<|im|>", "<|im|><", "the", ".", "東京", "\n\n"]
MODELS: dict[str, dict[str, Any]] = {
    "symbols": PLAIN | {"byte_fallback": True, "user_defined_symbols": SYMBOLS},
    "symbols without bytes": PLAIN | {"user_defined_symbols": SYMBOLS},
    "control symbols": PLAIN
    | {
        "byte_fallback": True,
        "user_defined_symbols": ["<tool>"],
        "control_symbols": ["[INST]", "[é]", "</x>"],
    },
    "no space in front": PLAIN
    | {
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>"],
        "bos_id": -1,
        "eos_id": 0,
        "unk_id": 1,
        "pad_id": 2,
    },
    "sentencepiece's defaults": {"model_type": "unigram"},
    "unigram symbols": PLAIN
    | {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": SYMBOLS},
    "end of text elsewhere": PLAIN
    | {"byte_fallback": True, "unk_id": 0, "pad_id": 1, "eos_id": 3, "bos_id": 2},
}
# Beside what every symbol is put into.
TEXTS = [
    "<|im_start|>user the fox<|im_end|>\n<|im_start|>assistant",
    "x <|im_end|> y",
    "<|im|><|im_end|><|im|>",
    "</s>",
    "<tool></s><tool><s> a<tool>[INST]<tool>[é]<tool></x>",
    "<0x0A><tool><0x0A><tool>\n<unk>",
    "in 東京. The\n\nthe\n\n\nend",
    "  two  spaces ",
    "ﬁ ½ naïve 🎲\x00",
    "",
]


def train(directory: Path, **options: Any) -> Path:
    SentencePieceTrainer.train(
        sentence_iterator=iter(docstrings(["argparse", "difflib"])),
        model_prefix=str(directory / "trained"),
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 500} | options,
    )
    return directory / "trained.model"


def checkpoint_of(tmp_path: Path, vocabulary: int, **arguments: Any) -> Path:
    """Save a checkpoint whose run had these arguments."""
    save_llama(tmp_path / "hf", vocab_size=vocabulary, intermediate_size=16)
    import_hugging_face(tmp_path / "hf", tmp_path / "megatron", 8)
    release = tmp_path / "megatron" / "release"
    common = TorchDistReader(release).common_state
    vars(common["args"]).update(arguments)
    torch.save(common, release / "common.pt")
    return release


def export(release: Path, tmp_path: Path) -> Path:
    target = tmp_path / "exported"
    export_hugging_face(release, target, None, None, 10**9)
    return target


def special_ids(target: Path) -> tuple[int | None, ...]:
    """Bos, eos and pad as transformers reads them."""
    config = AutoConfig.from_pretrained(target)
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


@pytest.mark.parametrize("kind", [*MODELS, "Mistral v3"])
def test_sentencepiece(kind: str, tmp_path: Path) -> None:
    if kind == "Mistral v3":  # 20 user-defined and 750 control symbols
        data = Path(mistral_common.__file__).parent / "data"
        model = data / "mistral_instruct_tokenizer_240323.model.v3"
    else:
        model = train(tmp_path, **MODELS[kind])
    pieces = SentencePieceProcessor(model_file=str(model))
    release = checkpoint_of(
        tmp_path,
        len(pieces),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
    )
    target = export(release, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(target)
    names = [pieces.id_to_piece(at) for at in range(len(pieces))]
    named = [
        name
        for at, name in enumerate(names)
        if not pieces.is_byte(at) and (pieces.is_control(at) or name in SYMBOLS or "REF" in name)
    ]
    for text in [*TEXTS, *(f"a {name}b{name} {name}" for name in named)]:
        assert tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text), text
    assert tokenizer.convert_tokens_to_ids(names) == list(range(len(pieces)))
    ids = [at if at >= 0 else None for at in (pieces.bos_id(), pieces.eos_id(), pieces.pad_id())]
    assert list(special_ids(target)) == ids
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == ids
    text = "def f(x): return x"
    if "normalization_rule_name" in MODELS.get(kind, PLAIN):
        assert tokenizer.decode(pieces.encode(text)) == text


def test_a_model_type_with_a_tokenizer_of_its_own_is_refused(tmp_path: Path) -> None:
    """Whatever tokenizer_config.json says, transformers reads a Qwen2's files as bytes."""
    model = train(tmp_path, **MODELS["symbols"])
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    qwen = Architecture(
        2, 64, 128, 4, 2, 16, 500, 99, tied=False, qkv_bias=True, model_type="qwen2", **shape
    )
    release = write_random_llama(tmp_path, qwen, torch.float32) / "release"
    common = TorchDistReader(release).common_state
    common["args"].tokenizer_model = str(model)
    torch.save(common, release / "common.pt")
    with pytest.raises(UserError, match="cannot be exported: in training"):
        export(release, tmp_path)
    assert not (tmp_path / "exported").exists()


def test_what_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    """A symbol that spaces become."""
    model = train(tmp_path, user_defined_symbols=["▁▁", "a b"])
    release = checkpoint_of(tmp_path, 500, tokenizer_model=str(model))
    with pytest.raises(UserError, match=rf"the tokenizer {model} cannot be exported: in training"):
        export(release, tmp_path)
    assert not (tmp_path / "exported").exists()


def test_tokens_that_megatron_added_are_refused(tmp_path: Path) -> None:
    model = train(tmp_path, **PLAIN)
    release = checkpoint_of(
        tmp_path,
        500,
        tokenizer_model=str(model),
        tokenizer_sentencepiece_legacy=True,
        special_tokens=["<new>"],
    )
    with pytest.raises(UserError, match=r"added the special tokens \['<new>'\] to .*trained.model"):
        export(release, tmp_path)


def test_special_tokens_of_a_run_whose_tokenizer_is_gone(tmp_path: Path) -> None:
    """Those that the run recorded; otherwise none, and never transformers' 1 and 2."""
    recorded = {"bos_token_id": None, "eos_token_id": 99, "pad_token_id": 5}
    release = checkpoint_of(tmp_path, 100, slm_special_ids=recorded)
    assert special_ids(export(release, tmp_path)) == (None, 99, 5)


def test_special_tokens_of_what_was_imported(tmp_path: Path) -> None:
    """Without a run."""
    assert special_ids(export(checkpoint_of(tmp_path, 100), tmp_path)) == (1, 2, None)


def test_special_tokens_of_a_run_that_recorded_none(tmp_path: Path) -> None:
    release = checkpoint_of(tmp_path, 100, slm_special_ids=None)
    assert special_ids(export(release, tmp_path)) == (None, None, None)


@pytest.mark.parametrize("eos", [[128001, 9], 0, None])
def test_special_tokens_of_a_config(eos: Any, tmp_path: Path) -> None:
    """Through import and export."""
    release = checkpoint_of(tmp_path, 100)
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": eos}))
    import_hugging_face(tmp_path / "hf", tmp_path / "again", 8)
    assert special_ids(export(tmp_path / "again" / release.name, tmp_path)) == (1, eos, None)


def hugging_face_tokenizer(directory: Path, **named: Any) -> Path:
    """Write a tokenizer of five words whose special tokens have these names."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    directory.mkdir()
    words = {word: at for at, word in enumerate(["a", "<eos>", "b", "<bos>", "<pad>"])}
    Tokenizer(WordLevel(words)).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def test_special_tokens_of_a_directory(tmp_path: Path) -> None:
    """Of a Hugging Face tokenizer's own files."""
    named = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
    directory = hugging_face_tokenizer(tmp_path / "tokenizer", **named)
    release = checkpoint_of(tmp_path, 100, tokenizer_model=str(directory))
    assert special_ids(export(release, tmp_path)) == (3, 1, 4)


def test_special_tokens_of_the_model_come_first(tmp_path: Path) -> None:
    """As in Llama 3's and Qwen's, whose configs know of more than their tokenizers do."""
    directory = hugging_face_tokenizer(tmp_path / "tokenizer", eos_token="<eos>", pad_token="<pad>")
    ids = {"bos_token_id": 3, "eos_token_id": [50, 1], "pad_token_id": None}
    release = checkpoint_of(
        tmp_path, 100, tokenizer_model=str(directory), slm_model_special_ids=ids
    )
    assert special_ids(export(release, tmp_path)) == (3, [50, 1], None)


def test_a_file_that_cannot_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and not the directory that is written."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    monkeypatch.setattr(tokenizer_files, "TOKENIZER_LIMIT", 10)
    with pytest.raises(UserError, match=rf"^{tmp_path}/vocab\.json has more than 10 bytes"):
        tokenizer_files.copy_tokenizer(tmp_path, tmp_path / "new")
