"""Directories whose keys and files disagree: what is imported computes what transformers computes,
or the import is refused.

Each is read by transformers on one side; on the other it is imported, exported as Megatron's
arguments say, and that is read by transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_slm.errors import UserError
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face

TOKENS = torch.arange(40)[None] % 37
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NO_LENGTH = {key: value for key, value in LLAMA3.items() if "original" not in key}
HALF = {"rope_type": "default", "rope_theta": 500.0}
Change = dict[str, Any]
# Changes to config.json; ... takes a key out.
CONFIGS: dict[str, Change] = {
    "as it is": {},
    "scaling beside parameters": {"rope_scaling": LLAMA3},
    "scaling beside parameters, old name": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling beside other parameters": {"rope_scaling": HALF, "rope_parameters": LLAMA3},
    "scaling without a base beside parameters": {"rope_scaling": LLAMA3, "rope_parameters": HALF},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": HALF},
    "null parameters": {"rope_parameters": None, "rope_scaling": LLAMA3},
    "two names of the type": {"rope_parameters": LLAMA3 | {"type": "linear", "rope_theta": 1e4}},
    "no type": {"rope_parameters": {"rope_theta": 500.0}},
    "a type of null": {"rope_parameters": {"rope_type": None, "rope_theta": 500.0}},
    "base in both": {"rope_parameters": HALF, "rope_theta": 77.0},
    "base outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
    "base outside, without parameters": {"rope_parameters": ..., "rope_theta": 77.0},
    "base of null inside": {"rope_parameters": {"rope_theta": None}, "rope_theta": 77.0},
    "half of a head rotated": {"partial_rotary_factor": 0.5},
    "half of a head rotated, inside": {"rope_parameters": HALF | {"partial_rotary_factor": 0.5}},
    "half of a head scaled": {"rope_parameters": LLAMA3, "partial_rotary_factor": 0.5},
    "original length outside": {
        "rope_parameters": LLAMA3 | {"rope_theta": 1e4},
        "original_max_position_embeddings": 16,
    },
    "original length from positions": {
        "rope_parameters": NO_LENGTH | {"rope_theta": 1e4},
        "max_position_embeddings": 8192,
    },
    "original length from other positions": {"rope_parameters": NO_LENGTH | {"rope_theta": 1e4}},
    "parameters of layers": {"rope_parameters": {"full_attention": LLAMA3 | {"rope_theta": 1e4}}},
    "head size of null": {"head_dim": None},
    "head size left out": {"head_dim": ...},
    "another head size": {"head_dim": 16},
    "an odd head size": {"head_dim": 5},
    "no groups": {"num_key_value_heads": ...},
    "groups of null": {"num_key_value_heads": None},
    "groups that do not divide": {"num_key_value_heads": 3},
    "heads that do not divide": {"num_attention_heads": 5, "head_dim": 8},
    "more tokens": {"vocab_size": 65},
    "a window": {"sliding_window": 5},
    "a window of null": {"sliding_window": None},
    "no window": {"sliding_window": ...},
    "layers with a window": {"layer_types": ["sliding_attention"], "sliding_window": 5},
    "layers without": {"layer_types": ["full_attention"]},
    "windows of Qwen": {"max_window_layers": 1, "use_sliding_window": False},
    "windows of Qwen, used": {"max_window_layers": 0, "use_sliding_window": True},
    "windows of Qwen, used by no layer": {"max_window_layers": 1, "use_sliding_window": True},
    "windows of Qwen, used by no layer that is named": {
        "layer_types": ["full_attention"],
        "max_window_layers": 0,
        "use_sliding_window": True,
    },
    "layers too many": {"layer_types": ["full_attention"] * 2},
    "biases": {"attention_bias": True},
    "more biases": {"mlp_bias": True},
    "another activation": {"hidden_act": "gelu"},
    "tensor parallel": {"pretraining_tp": 2},
    "another epsilon": {"rms_norm_eps": 0.5},
    "epsilon left out": {"rms_norm_eps": ...},
    "epsilon of null": {"rms_norm_eps": None},
    "tied": {"tie_word_embeddings": True},
    "tied of null": {"tie_word_embeddings": None},
    "tied of text": {"tie_word_embeddings": "false"},
    "half precision": {"dtype": "bfloat16", "torch_dtype": "float16"},
    "other weights": {"transformers_weights": "other.safetensors"},
    "other layers": {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"sliding_window": 7}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"sliding_window": 7, "head_dim": 8}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    config, kind, more = FAMILIES[request.param]
    torch.manual_seed(3)
    kind(config(**SHAPE, **more)).save_pretrained(directory)
    return directory


def changed(model: Path, directory: Path, change: Change) -> Path:
    shutil.copytree(model, directory)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return directory


def logits(directory: Path) -> Tensor | None:
    """Return transformers' logits; None if it refuses, or would make weights up."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        if found["missing_keys"] or found["mismatched_keys"]:
            return None
        with torch.no_grad():
            return model(TOKENS, use_cache=False).logits
    except Exception:
        return None


def through_megatron(source: Path, directory: Path) -> tuple[Tensor | None, str]:
    """Logits of what was imported, or None with the refusal."""
    try:
        import_hugging_face(source, directory / "megatron", 64)
    except UserError as error:
        return None, str(error)
    target = directory / "exported"
    export_hugging_face(directory / "megatron" / "release", target, None, None, 10**9)
    found = logits(target)
    assert found is not None
    return found, ""


def test_configurations(model: Path, tmp_path: Path) -> None:
    """Every one, and two at a time."""
    cases = list(CONFIGS.items())
    pairs = random.Random(0)
    for _ in range(20):
        (one, a), (other, b) = pairs.sample(cases, 2)
        cases.append((f"{one}, {other}", a | b))
    wrong, imported = [], 0
    for number, (name, change) in enumerate(cases):
        place = tmp_path / str(number)
        source = changed(model, place / "source", change)
        expected = logits(source)
        found, refusal = through_megatron(source, place)
        imported += found is not None
        if found is None:
            if "config.json" not in refusal:
                wrong.append(f"{name}: refused without the file's name: {refusal}")
        elif expected is None:
            wrong.append(f"{name}: imported, and transformers does not read it")
        elif not torch.allclose(found, expected, atol=1e-5):
            wrong.append(f"{name}: other logits than transformers'")
    assert not wrong
    assert imported > 25


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, Tensor]


def write(directory: Path, name: str, tensors: Tensors) -> None:
    save_file(tensors, directory / name, metadata={"format": "pt"})


def index(directory: Path, where: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def split(directory: Path, tensors: Tensors) -> dict[str, str]:
    """Put the model into two files and an index."""
    (directory / SINGLE).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in halves.items():
        write(directory, file, {name: tensors[name] for name in some})
    where = {name: file for file, some in halves.items() for name in some}
    index(directory, where)
    return where


def one_file_and_its_index(directory: Path, tensors: Tensors) -> None:
    index(directory, dict.fromkeys(tensors, SINGLE))


def one_file_and_an_index_of_others(directory: Path, tensors: Tensors) -> None:
    split(directory, tensors)
    write(directory, SINGLE, {name: tensor + 1 for name, tensor in tensors.items()})


def twice(directory: Path, tensors: Tensors) -> None:
    """Put one tensor into two files, of which the index names the first."""
    where = split(directory, tensors)
    name = next(name for name, file in where.items() if file == "a.safetensors")
    others = load_file(directory / "b.safetensors") | {name: tensors[name] + 1}
    write(directory, "b.safetensors", others)


def exchanged(directory: Path, tensors: Tensors) -> None:
    where = split(directory, tensors)
    others = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    index(directory, {name: others[file] for name, file in where.items()})


def linked(directory: Path, tensors: Tensors) -> None:
    """As in the cache of the Hub."""
    for name in (SINGLE, "config.json"):
        (directory.parent / "blobs").mkdir(exist_ok=True)
        (directory / name).rename(directory.parent / "blobs" / name)
        (directory / name).symlink_to(Path("..") / "blobs" / name)


def base_alone(directory: Path, tensors: Tensors) -> None:
    write(directory, SINGLE, {name.removeprefix("model."): t for name, t in tensors.items()})


def without(*names: str) -> Callable[[Path, Tensors], None]:
    def change(directory: Path, tensors: Tensors) -> None:
        write(directory, SINGLE, {n: t for n, t in tensors.items() if n not in names})

    return change


def with_more(**more: Tensor) -> Callable[[Path, Tensors], None]:
    return lambda directory, tensors: write(directory, SINGLE, tensors | more)


def copied_head(directory: Path, tensors: Tensors) -> None:
    write(directory, SINGLE, tensors | {HEAD: tensors[EMBEDDING].clone()})


def adapted(directory: Path, tensors: Tensors) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')


TIED = {"tie_word_embeddings": True}
# Change of config.json, of the files, and what a refusal says; None for what is imported.
FILES: dict[str, tuple[Change, Callable[[Path, Tensors], object], tuple[str, ...] | None]] = {
    "two files": ({}, split, None),
    "one file and its index": ({}, one_file_and_its_index, None),
    "one file and an index of others": ({}, one_file_and_an_index_of_others, (SINGLE, INDEX)),
    "a tensor in two files": ({}, twice, ("a.safetensors", "b.safetensors")),
    "an index that is wrong": ({}, exchanged, (INDEX, "a.safetensors", "b.safetensors")),
    "links": ({}, linked, None),
    "tied, and two tensors": (TIED, lambda *_: None, None),
    "tied, and a copy": (TIED, copied_head, None),
    "tied, and one tensor": (TIED, without(HEAD), None),
    "tied, and the head alone": (TIED, without(EMBEDDING), (EMBEDDING,)),
    "untied, and one tensor": ({}, without(HEAD), (HEAD, "tie_word_embeddings")),
    "a model without a head": (TIED, base_alone, (EMBEDDING,)),
    "an adapter": ({}, adapted, ("adapter_config.json",)),
    "old buffers": (
        {},
        with_more(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        None,
    ),
    "a layer too many": (
        {},
        with_more(**{"model.layers.1.mlp.up_proj.weight": torch.ones(4)}),
        ("model.layers.1.mlp.up_proj.weight",),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, model: Path, tmp_path: Path) -> None:
    change, spoil, refused = FILES[case]
    source = changed(model, tmp_path / "hub" / "source", change)
    spoil(source, load_file(model / SINGLE))
    found, refusal = through_megatron(source, tmp_path)
    if refused is not None:
        assert all(part in refusal for part in refused), refusal
        return
    expected = logits(source)
    assert found is not None and expected is not None, refusal
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two different tensors under one name, and another dtype, with the files that say so."""
    source = changed(model, tmp_path / "source", TIED | {"dtype": "float16"})
    import_hugging_face(source, tmp_path / "megatron", 64)
    tied, dtype = capsys.readouterr().err.splitlines()
    assert f"{source / 'config.json'} has tie_word_embeddings true" in tied
    assert f"{source / SINGLE} a {HEAD} that differs" in tied
    assert dtype.startswith(f"{source / 'config.json'} says float16, and the tensors are float32")
    # Such a directory also serves as --like of what was made of it.
    target = tmp_path / "exported"
    export_hugging_face(tmp_path / "megatron" / "release", target, source, None, 10**9)
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
