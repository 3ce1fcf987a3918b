"""Losses of models outside Megatron, against transformers' own of the same documents."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from completions import Model, completions_server
from corpus import MODEL, PIECES, Document, Result, preprocess, read_dataset, run_tool, write_jsonl
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import read_cache_manifest
from megatron_slm.jobs.outside import server as server_module
from real_text import docstrings

LENGTH = 48
RUN = ("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", MODEL, "--seq-length", LENGTH)
EXACT = ("--cache-dtype", "float32")
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Docstrings in the sentencepiece tokens of Mistral."""
    where = tmp_path_factory.mktemp("data")
    texts = [*docstrings(["argparse"])[:40], "naïve 東京 🎲\n\n x", "  ", "x"]
    preprocess(write_jsonl(where / "in.jsonl", texts), where / "out", "--append-eod")
    return where / "out_text_document"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights, large enough to matter, with a byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(docstrings(["argparse", "difflib"]), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=960,  # with padding
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def values_of(cache: Path, prefix: Path) -> list[np.ndarray]:
    """Return a cache's values of each document's tokens."""
    manifest = read_cache_manifest(cache)
    section = Section(cache, manifest, prefix.name)
    stream = np.concatenate([section.losses(number, None) for number in range(len(section))])
    ends = np.cumsum([len(ids) for ids in read_dataset(prefix)])
    assert (stream[ends[-1] :] == 0).all()
    return np.split(stream[: ends[-1]], ends[:-1])


def scored(prefix: Path, cache: Path, *more: object, code: int = 0) -> Result:
    options = ("--data-path", prefix, *RUN, "--slm-reference-cache", cache, *more)
    result = run_tool("score_with_model", *options)
    assert result.code == code, result.err
    return result


def text_of(ids: Document) -> str:
    return str(PIECES.decode([each for each in ids if each != PIECES.eos_id()]))


def by_transformers(
    model: Path, ids: list[int], vocabulary: int, length: int = LENGTH
) -> np.ndarray:
    """Losses of all tokens but the first, in windows that begin with the token before them."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            logits = loaded(window[:, :-1]).logits[0, :, :vocabulary]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    return torch.cat(losses).numpy()


@pytest.fixture(scope="module")
def cache(prefix: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model, in float32."""
    directory = tmp_path_factory.mktemp("scored") / "cache"
    options = ("--model", model, "--batch-tokens", 300, "--shard-samples", 16, *EXACT)
    said = scored(prefix, directory, *options).out
    assert "is complete" in said and "% of 2,299 tokens" in said
    return directory


def test_losses_by_text(prefix: Path, model: Path, cache: Path) -> None:
    """Each document has the sum of what transformers gives its text, its end its own."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for ids, values in zip(read_dataset(prefix), values_of(cache, prefix), strict=True):
        theirs = tokenizer.encode(text_of(ids)).ids
        expected = by_transformers(model, [BOS, *theirs, EOS], tokenizer.get_vocab_size())
        assert values[:-1].sum() == pytest.approx(expected[:-1].sum(), rel=1e-5)
        assert values[-1] == pytest.approx(expected[-1], rel=1e-4)
        words = [PIECES.id_to_piece(each).replace("\u2581", " ") for each in ids[:-1]]
        other = [tokenizer.decode([each]) for each in theirs]
        if words[0].strip() == other[0]:  # both begin with the same word, which keeps its loss
            assert values[0] == pytest.approx(expected[0], rel=1e-4)


def test_a_job_goes_on(prefix: Path, model: Path, cache: Path, tmp_path: Path) -> None:
    """With the shard that is missing, whoever writes it; not with another model."""
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    shards = sorted(copy.rglob("*.losses"))
    assert len(shards) == 3
    content = shards[1].read_bytes()
    shards[1].unlink()
    options = ("--model", model, "--batch-tokens", 300, "--shard-samples", 16)
    scored(prefix, copy, *options, *EXACT)
    assert shards[1].read_bytes() == content
    error = scored(prefix, copy, *options, code=2).err
    assert "dtype is uint16 here, float32 there" in error.splitlines()[-1]


@pytest.mark.parametrize("text_only", [False, True])
def test_server(
    text_only: bool, prefix: Path, model: Path, cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A server of the model gives its losses, though it is busy or breaks off now and then.

    One that takes text alone cannot score the end of a text, and reads long ones in parts.
    """
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.01)
    served = serve(model, text_only)
    served.fail_every, served.cut_every = 7, 11
    with completions_server(served) as url:
        length = ("--seq-length", 1024) if text_only else ()
        options = ("--server", url, "--model-tokenizer", model, "--concurrency", 3, *EXACT)
        scored(prefix, tmp_path / "cache", *options, *length)
    if not text_only:
        found = (values_of(each, prefix) for each in (tmp_path / "cache", cache))
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        return
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = values_of(tmp_path / "cache", prefix)
    for ids, values in zip(read_dataset(prefix), found, strict=True):
        theirs = [BOS, *tokenizer.encode(text_of(ids)).ids]
        expected = by_transformers(model, theirs, tokenizer.get_vocab_size(), 1024)
        assert values[:-1].sum() == pytest.approx(expected.sum(), rel=1e-4)
        assert values[-1] == pytest.approx(values[:-1].mean(), rel=1e-3)


def serve(model: Path, text_only: bool) -> Model:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return Model(AutoModelForCausalLM.from_pretrained(model), tokenizer, BOS, text_only)


def test_servers_that_cannot_be_used(
    prefix: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One line that says why, before anything is written."""
    monkeypatch.setattr(server_module, "FIRST_PAUSE", 0.0)
    served = serve(model, False)
    served.shift = 1
    options = ("--model-tokenizer", model)
    with completions_server(served) as url:
        off = scored(prefix, tmp_path / "a", "--server", url, *options, code=2).err
        served.shift, served.fail_every = 0, 1
        busy = scored(prefix, tmp_path / "a", "--server", url, *options, code=2).err
        served.fail_every = 0
        own = ("--model-tokenizer", MODEL)
        wrong = scored(prefix, tmp_path / "a", "--server", url, *own, code=2).err
    gone = scored(prefix, tmp_path / "a", "--server", url, *options, code=2).err
    none = scored(prefix, tmp_path / "a", "--server", "http://a:x/v1", *options, code=2).err
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    key = scored(prefix, tmp_path / "a", "--server", url, *options, code=2).err
    assert "its losses of prompts cannot be used" in off
    assert "does not answer after 8 attempts: 503" in busy
    assert "is a sentencepiece tokenizer" in wrong
    assert "does not answer after 8 attempts" in gone and "refused" in gone
    assert "error: --server http://a:x/v1: nonnumeric port: 'x'" in none
    assert "OPENAI_API_KEY in the environment has characters" in key and "secret" not in key
    for said in (off, busy, wrong, gone, none, key):
        assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def changed_model(model: Path, where: Path, **changes: torch.Tensor | None) -> Path:
    """Return a copy of a model with other weights, or without those that are None."""
    shutil.copytree(model, where)
    weights = load_file(where / "model.safetensors") | changes
    kept = {name: each for name, each in weights.items() if each is not None}
    save_file(kept, where / "model.safetensors", metadata={"format": "pt"})
    return where


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of few documents."""
    where = tmp_path_factory.mktemp("few")
    texts = docstrings(["argparse"])[:4]
    preprocess(write_jsonl(where / "in.jsonl", texts), where / "out", "--append-eod")
    return where / "out_text_document"


def test_model_that_gives_no_losses(few: Path, model: Path, tmp_path: Path) -> None:
    broken = {"model.norm.weight": torch.full((32,), float("nan"))}
    directory = changed_model(model, tmp_path / "model", **broken)
    error = scored(few, tmp_path / "cache", "--model", directory, code=2).err
    said = f"error: --model {directory} gives token 0 of 48 of a passage of document 0 of out_text_"
    assert error.splitlines()[-1].startswith(said) and error.endswith("usable loss, but none\n")
    assert not list((tmp_path / "cache").rglob("*.losses"))


def test_models_of_other_weights(few: Path, model: Path, tmp_path: Path) -> None:
    """None of a model's weights are random, and none in its files are left out."""
    name = "model.layers.1.mlp.up_proj.weight"
    without = changed_model(model, tmp_path / "without", **{name: None})
    more = changed_model(model, tmp_path / "more", **{"model.other.weight": torch.zeros(2)})
    other = changed_model(model, tmp_path / "other", **{name: torch.zeros(2, 2)})
    for directory, said in (
        (without, f"has missing weights for its config.json: {name}"),
        (more, "has unexpected weights for its config.json: model.other.weight"),
        (other, f"has mismatched weights for its config.json: {name}"),
    ):
        error = scored(few, tmp_path / "cache", "--model", directory, code=2).err
        assert f"error: --model {directory} " in error and said in error
    assert not (tmp_path / "cache").exists()


def test_model_of_few_positions(few: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    short = GPT2Config(vocab_size=960, n_positions=LENGTH - 1, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(short).save_pretrained(tmp_path / "model")
    error = scored(few, tmp_path / "cache", "--model", tmp_path / "model", code=2).err
    assert "has 47 positions (max_position_embeddings), fewer than --seq-length 48" in error
    assert not (tmp_path / "cache").exists()


class Changed(Model):
    """A server whose log-probabilities of documents are changed."""

    def __init__(self, served: Model, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(served.model, served.tokenizer, served.bos, served.text_only)
        self.change, self.asked = change, 0

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        code, content = super().answer(body)
        self.asked += body["echo"]
        if code == 200 and body["echo"] and self.asked > 2:  # those before test the server
            self.change(content["choices"][0]["logprobs"])
        return code, content


def none_after_first(found: dict[str, Any]) -> None:
    found["token_logprobs"][1:] = [None] * len(found["token_logprobs"][1:])


def all_of(value: float) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        found["token_logprobs"] = [value] * len(found["token_logprobs"])

    return change


@pytest.mark.parametrize(
    ("change", "text_only", "said"),
    [
        (none_after_first, False, "usable loss, but none"),
        (none_after_first, True, "usable loss, but none"),
        (lambda found: found["tokens"].pop(), False, "log-probabilities"),
        (lambda found: found.update(tokens=[]), False, "lists 0 tokens, but"),
        (all_of(5.0), False, "usable loss, but -5"),
        (all_of(-1e300), False, "usable loss, but 1e+300"),
    ],
)
def test_server_that_gives_no_losses(
    change: Callable[[dict[str, Any]], None],
    text_only: bool,
    said: str,
    few: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    """The error names the server, whatever it gives."""
    with completions_server(Changed(serve(model, text_only), change)) as url:
        options = ("--server", url, "--model-tokenizer", model)
        error = scored(few, tmp_path / "cache", *options, code=2).err.splitlines()[-1]
    assert error.startswith(f"error: {url} ") and said in error
    assert not list((tmp_path / "cache").rglob("*.losses"))


def test_windows_too_short_for_text(few: Path, model: Path, tmp_path: Path) -> None:
    with completions_server(serve(model, text_only=True)) as url:
        options = ("--server", url, "--model-tokenizer", model, "--seq-length", 16)
        error = scored(few, tmp_path / "cache", *options, code=2).err
    assert f"error: --seq-length 16 must be above 16 with --server {url}" in error
    assert not (tmp_path / "cache").exists()


def test_the_same_tokenizer(model: Path, tmp_path: Path) -> None:
    """The dataset's own tokens are scored, in windows that know nothing of documents."""
    texts = write_jsonl(tmp_path / "in.jsonl", docstrings(["difflib"])[:12])
    own = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model)
    preprocess(texts, tmp_path / "out", *own, "--engine", "hf", "--append-eod")
    data = tmp_path / "out_text_document"
    scored(data, tmp_path / "cache", *own, "--model", model, *EXACT)
    stream = [EOS, *(number for ids in read_dataset(data) for number in ids)]
    found = np.concatenate(values_of(tmp_path / "cache", data))
    expected = by_transformers(
        model, stream, read_cache_manifest(tmp_path / "cache").source.vocabulary
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    size = len(Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab())
    content = np.fromfile(f"{data}.bin", np.uint16)
    content[7] = size
    content.tofile(f"{data}.bin")
    error = scored(data, tmp_path / "other", *own, "--model", model, code=2).err.splitlines()[-1]
    assert f"document 0: the token {size} is none of the tokenizer's {size}; tools/" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name what scores: either --model DIR or --server URL"),
        (("--server", "http://127.0.0.1:1/v1"), "--server needs --model-tokenizer"),
        (("--model", "absent"), "--model-tokenizer absent"),
        (("--model", MODEL.parent), "--model-tokenizer"),
        (("--model", "x", "--batch-tokens", 0), "--batch-tokens 0 must be above 0"),
    ],
)
def test_refused(options: tuple[object, ...], said: str, prefix: Path, tmp_path: Path) -> None:
    error = scored(prefix, tmp_path / "cache", *options, code=2).err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("rank", "ranks"), [("x", "1"), ("0", "0"), ("5", "2"), ("-1", "2")])
def test_ranks_that_are_none(
    rank: str, ranks: str, few: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    error = scored(few, tmp_path / "cache", "--model", model, code=2).err
    assert error.startswith(f"error: RANK={rank} and WORLD_SIZE={ranks} in the environment are")
    assert not (tmp_path / "cache").exists()


def test_tasks_without_ranks(few: Path, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each of them would score everything."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "64")
    error = scored(few, tmp_path / "cache", "--model", model, code=2).err
    assert "error: srun started 64 tasks, and none of them knows its rank" in error


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python, whose server this is about, is not installed",
)
def test_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp's own server gives transformers' losses of the same weights, but for the first
    token's; without a token for the beginning of a text it leaves one out, and is refused."""
    from llama_cpp_server import gguf_model, serving

    texts = [*docstrings(["argparse"])[:6], "naïve 東京 🎲\n\n x"]
    preprocess(write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "out", "--append-eod")
    data = tmp_path / "out_text_document"
    directory = gguf_model(tmp_path / "model", beginning=True)
    options = ("--model-tokenizer", directory, "--concurrency", 1, *EXACT, "--seq-length", 1024)
    with serving(directory / "model.gguf") as url:
        scored(data, tmp_path / "served", "--server", url, *options)
    found = values_of(tmp_path / "served", data)
    for ids, values in zip(read_dataset(data), found, strict=True):
        whole = [PIECES.bos_id(), *ids[:-1]]
        expected = by_transformers(directory, whole, PIECES.get_piece_size(), 1024)
        np.testing.assert_allclose(values[1:-1], expected[1:], rtol=0, atol=0.02)
    without = gguf_model(tmp_path / "without", beginning=False)
    with serving(without / "model.gguf") as url:
        error = scored(data, tmp_path / "none", "--server", url, *options, code=2).err
    assert "tokens where --model-tokenizer has" in error
