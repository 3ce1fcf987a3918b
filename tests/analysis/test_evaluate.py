"""Evaluation of a model that went to Megatron and back: lm-eval's scores against transformers' and
torch's own, with no network."""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from launch import REPOSITORY
from megatron_slm.analysis.evaluation import evaluate as evaluation
from megatron_slm.analysis.experiments.evaluations import check_evaluation, read_scores
from megatron_slm.analysis.experiments.experiment import tasks_of
from megatron_slm.analysis.experiments.recipe import read_experiment
from megatron_slm.errors import UserError
from megatron_slm.model.conversion.import_hf import import_hugging_face
from real_text import docstrings

LOCAL = runpy.run_path(str(REPOSITORY / "examples" / "experiments" / "questions.py"))
TEXTS = docstrings(["argparse", "difflib", "statistics"])
QUESTIONS = 50
SHOTS = 4  # the paper's for mathqa
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
training_split: train
doc_to_text: "{{{{question}}}}"
fewshot_config: {{sampler: first_n}}
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
RIGHT_WORDS = """
output_type: loglikelihood
num_fewshot: 2
doc_to_target: "{{' ' + choices[answer]}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


def run(*arguments: object) -> None:
    main = runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"))["main"]
    main([*map(str, arguments), "--device", "cpu"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every attempt at a connection fails, and fails the test."""
    attempts: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield attempts
    assert not attempts


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More would only wait for each other over matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama, with a byte-level BPE trained on real text, by transformers."""
    directory = tmp_path_factory.mktemp("llama") / "hf"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def megatron(llama: Path) -> Path:
    directory = llama.with_name("megatron")
    import_hugging_face(llama, directory, 128)
    return directory


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Questions of real text: which words come next?"""
    words = [text.split() for text in TEXTS]
    long = [text for text in words if len(text) >= 19][:QUESTIONS]
    assert len(long) == QUESTIONS
    return [
        {
            "question": " ".join(text[:8]),
            "choices": [" ".join(text[at : at + 3]) for at in (8, 12, 16)],
            "answer": number % 3,
        }
        for number, text in enumerate(long)
    ]


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks, one of them under a name that lm-eval and the paper have as well."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, kind in (("which_words", CHOICES), ("mathqa", CHOICES), ("right_words", RIGHT_WORDS)):
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    unsafe = TASK.format(name="unsafe", data=data) + CHOICES + "unsafe_code: true\n"
    (directory / "unsafe.yaml").write_text(unsafe)
    (directory / "group.yaml").write_text("group: unsafe_group\ntask: [which_words, unsafe]\n")
    (directory / "broken.yaml").write_text("group: broken\ntask: [no_such_task]\n")
    endless = TASK.format(name="endless", data=data) + RIGHT_WORDS.replace("]}}", "] * 30}}")
    (directory / "endless.yaml").write_text(endless)
    texts = directory / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    LOCAL["main"]([str(directory), f"prose={texts}"])
    return directory


def expected_scores(directory: Path, documents: list[dict[str, Any]]) -> dict[str, float]:
    """By one forward pass a choice: no batches, no padding, no lm-eval."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def log_likelihood(prompt: str, words: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(f"{prompt} {words}")["input_ids"])
        with torch.no_grad():
            logs = model(ids[None]).logits[0].log_softmax(-1)
        return logs[start - 1 : -1].gather(1, ids[start:, None]).sum().item()

    def accuracies(examples: str) -> tuple[float, float]:
        """By log likelihood, and by that over the number of characters."""
        right, right_by_length = 0, 0
        for document in documents:
            choices, prompt = document["choices"], examples + document["question"]
            logs = [log_likelihood(prompt, words) for words in choices]
            by_length = [log / len(words) for log, words in zip(logs, choices, strict=True)]
            right += logs.index(max(logs)) == document["answer"]
            right_by_length += by_length.index(max(by_length)) == document["answer"]
        return right / len(documents), right_by_length / len(documents)

    answered = [f"{one['question']} {one['choices'][one['answer']]}\n\n" for one in documents]
    plain, by_length = accuracies("")
    answers = [
        log_likelihood("".join(answered[:2]) + one["question"], one["choices"][one["answer"]])
        for one in documents
    ]
    return {
        "which_words acc,none": plain,
        "which_words acc_norm,none": by_length,
        "mathqa acc,none": accuracies("".join(answered[:SHOTS]))[0],
        "right_words perplexity,none": math.exp(-sum(answers) / len(answers)),
    }


def test_exported_model_has_the_scores_of_the_original(
    llama: Path,
    megatron: Path,
    documents: list[dict[str, Any]],
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {}
    for name, model in (("llama", [llama]), ("megatron", [megatron, "--like", llama])):
        output = tmp_path / f"{name}.json"
        local = ["--include-path", tasks, "--tasks", "which_words", "mathqa", "right_words"]
        run("--model", *model, *local, "--output", output)
        found[name] = json.loads(output.read_text())["scores"]
    assert found["megatron"] == found["llama"]

    values = {f"{score['task']} {score['metric']}": score["value"] for score in found["llama"]}
    expected = expected_scores(llama, documents)
    assert set(values) == set(expected)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name
    assert [score["shots"] for score in found["llama"]] == [0, 0, SHOTS, 2]

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(line for line in lines if line[0] == "which_words")
    assert row[1:4] == ["0", "(default)", str(QUESTIONS)]
    row = next(line for line in lines if line[0] == "mathqa")
    assert row[1:4] == [str(SHOTS), str(QUESTIONS), "acc,none"]
    assert row[4] == f"{expected['mathqa acc,none']:.4f}"
    assert row[6:] == ["0.139", "0.304", "0.477", "0.587"]  # MQA in the paper's table 1


def test_local_questions(llama: Path, tasks: Path, tmp_path: Path) -> None:
    """They are answered by what they say, and lm-eval reads them as they are meant."""
    made = {
        name: [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sums-questions", "sums-examples", "prose-questions")
    }
    count = len(made["prose-questions"])
    assert len(made["sums-questions"]) == 100 and len(made["sums-examples"]) == 4 and count > 10
    for one in made["sums-questions"] + made["sums-examples"]:
        numbers = [int(word) for word in one["question"].removesuffix(" =").split(" + ")]
        assert one["choices"][one["answer"]] == str(sum(numbers))
        assert len(set(one["choices"])) == 4
    whole = "\0".join(TEXTS)
    for one in made["prose-questions"]:
        found = [f"{one['question']} {words}" in whole for words in one["choices"]]
        assert found[one["answer"]] and len(set(one["choices"])) == 4
    assert {one["answer"] for one in made["sums-questions"]} > {0}
    output = tmp_path / "scores.json"
    local = ["--include-path", tasks, "--tasks", "sums", "prose"]
    run("--model", llama, *local, "--output", output)
    scores = json.loads(output.read_text())["scores"]
    assert [(one["task"], one["metric"], one["shots"], one["samples"]) for one in scores] == [
        ("sums", "acc,none", 4, 100),
        ("prose", "acc_norm,none", 0, count),
    ]
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match="no text is long enough"):
        LOCAL["main"]([str(tmp_path), f"short={tmp_path / 'short.jsonl'}"])


def test_odd_texts_of_local_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line separators within a text, and a name that YAML would take for false."""
    texts = tmp_path / "texts.jsonl"
    odd = (
        json.dumps({"text": f"{text}\u2028\x85 and so on"}, ensure_ascii=False) for text in TEXTS
    )
    texts.write_text("\n".join(odd))
    LOCAL["main"]([str(tmp_path), f"no={texts}"])
    assert yaml.safe_load((tmp_path / "no.yaml").read_text())["task"] == "no"
    texts.write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(UserError, match=r"texts.jsonl, line 2 cannot be read: .* field `text`"):
        LOCAL["main"]([str(tmp_path), f"no={texts}"])
    with pytest.raises(SystemExit):
        LOCAL["main"]([str(tmp_path), f"general={texts}"])
    assert "where NAME is not sums, math or general" in capsys.readouterr().err


def test_an_arm_of_a_study(
    llama: Path,
    megatron: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its evaluation is a task of the study, whose command gives it the tool's own scores."""
    recipe = tmp_path / "recipe.yaml"
    local = f"--include-path {tasks} --tasks which_words right_words"
    recipe.write_text(
        f"seeds: [1]\nstages: {{hf: {{run: make it}}}}\narms: {{clm: {{}}}}\n"
        f"evaluate: --like {{hf}} {local} --device cpu\n"
    )
    stage, arm, evaluated = tasks_of(read_experiment(recipe), None, None)
    for one, source in ((stage, llama), (arm, megatron)):
        one.prepare(tmp_path)
        (tmp_path / one.output).parent.mkdir(exist_ok=True)
        shutil.copytree(source, tmp_path / one.output, dirs_exist_ok=True)
    assert read_scores(arm, tmp_path) == {}
    evaluated.prepare(tmp_path)
    ((python, flag, module, *arguments),) = evaluated.commands(tmp_path)
    assert (python, flag) == (sys.executable, "-m")
    monkeypatch.chdir(tmp_path)
    importlib.import_module(module).main(arguments)
    evaluated.finish(tmp_path)
    run("--model", llama, *local.split(), "--output", tmp_path / "own.json")
    own = json.loads((tmp_path / "own.json").read_text())["scores"]
    assert read_scores(arm, tmp_path) == {
        f"{one['task']} {one['metric'].removesuffix(',none')}": one["value"] for one in own
    }
    assert list(read_scores(arm, tmp_path)) == [
        *("which_words acc", "which_words acc_norm", "right_words perplexity")
    ]
    text = recipe.read_text()
    recipe.write_text(text.replace("which_words", "which_word"))
    with pytest.raises(UserError, match=r"evaluate: --tasks which_word: neither .*; near it are"):
        check_evaluation(read_experiment(recipe))
    recipe.write_text(text.replace(str(tasks), "{hf}"))
    check_evaluation(read_experiment(recipe))  # the stage may make a task of that name


def test_an_export_that_was_left_is_removed(
    llama: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from megatron_slm.analysis.evaluation.evaluate import hugging_face_directory
        with hugging_face_directory(Path({str(megatron)!r}), None, Path({str(llama)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
        """
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("megatron-slm-*")
    assert (left / "hf" / "model.safetensors").exists()
    with evaluation.hugging_face_directory(megatron, None, llama) as exported:
        assert [*tmp_path.glob("megatron-slm-*")] == [exported.parent] != [left]
    assert not [*tmp_path.glob("megatron-slm-*")]


def test_what_is_refused(
    llama: Path,
    megatron: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = ["--include-path", tasks, "--tasks", "which_words"]
    for arguments, message in (
        (["--model", tmp_path / "none", *local], "none: no such directory"),
        (["--model", tmp_path, *local], "neither a config.json nor a latest_checkpointed"),
        (["--model", megatron, *local], "no tokenizer; name a Hugging Face directory that has"),
        (["--model", llama, *local[:3], "which_word"], "name; near it are which_words"),
        (["--model", llama, *local[:3], "general"], "humaneval runs code that the model writes"),
        (["--model", llama, *local[:3], "unsafe"], "unsafe runs code that the model writes"),
        (["--model", llama, *local[:3], "unsafe_group"], "group runs code that the model writes"),
        (["--model", llama, *local[:3], "broken"], "broken cannot be loaded"),
        (["--model", llama, *local[:3], "endless"], "endless fails in lm-eval: AssertionError"),
        (["--model", llama, *local, "--task", "x"], "unrecognized arguments: --task x; did you me"),
        (["--model", llama, *local, "--include-path", llama / "no"], "no: no such directory"),
        (["--model", llama, *local, "--output", tmp_path / "no" / "o"], "there is no directory"),
    ):
        assert message in refused(capsys, *arguments)

    torn = tmp_path / "torn"
    shutil.copytree(llama, torn)
    os.truncate(torn / "model.safetensors", 5000)
    assert "cannot be read by transformers" in refused(capsys, "--model", torn, *local)

    tensors = load_file(llama / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, torn / "model.safetensors")
    assert f"lacks weights of its model: {gone}; copy" in refused(capsys, "--model", torn, *local)

    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    config = json.loads((odd / "config.json").read_text())
    for changed, message in (
        ({"num_hidden_layers": 10**9}, "Expected `int` <= 10000 - at `$.num_hidden_layers`"),
        ({"hidden_size": "64"}, "got `str` - at `$.hidden_size`"),
        ({"vocab_size": [257]}, "got `array` - at `$.vocab_size`"),
        ({"num_attention_heads": [4]}, "cannot be read by transformers"),
        ({"model_type": {"a": 1}}, "cannot be read by transformers"),
    ):
        (odd / "config.json").write_text(json.dumps(config | changed))
        assert message in refused(capsys, "--model", odd, *local)
    (odd / "config.json").write_text('{"x": ' + "[" * 100_000)
    assert "nested too deeply" in refused(capsys, "--model", odd, *local)

    with monkeypatch.context() as change:
        change.setenv("WORLD_SIZE", "2")
        change.setattr(torch.cuda, "device_count", lambda: 1)
        assert "2 ranks on 1 GPUs" in refused(capsys, "--model", llama, *local)
        assert "export it first" in refused(capsys, "--model", megatron, *local)

    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer; copy" in refused(capsys, "--model", bare, *local)
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer.model").write_bytes(b"a sentencepiece model")
    assert "without the tokenizer_config.json" in refused(capsys, "--model", bare, *local)

    (tasks / "questions.jsonl").rename(tmp_path / "questions.jsonl")
    assert "which_words cannot be loaded" in refused(capsys, "--model", llama, *local)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    assert "lm-eval is not installed" in refused(capsys, "--model", llama, *local)
