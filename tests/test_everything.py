"""From a Hugging Face model to an evaluated one, by the scripts that a cluster runs.

Recipes and tools run in one directory and find each other's files under the recipes' own names;
sizes, learning rates and the number of ranks are all that is set.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from corpus import run_tool
from forked_jobs import serving
from launch import REPOSITORY, Run, recipe_environment
from real_text import docstrings

SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
RATIO, STEPS = 0.6, 20
SMALL = {"SEQUENCE": 64, "BATCH": 16, "MICRO_BATCH": 4}
FUSED = ("--moe-grouped-gemm", "--moe-permute-fusion")  # what launch.sh leaves out here
MIX = """
budget: 10_000
sources:
  - {name: docstrings, domain: prose, data: docstrings_text_document}
"""
TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/next_word.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


class Directory:
    """Where everything runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    def tool(self, name: str, *arguments: object) -> str:
        """Run tools/NAME.py, and return what it prints."""
        command = [sys.executable, REPOSITORY / "tools" / f"{name}.py", *arguments]
        return self._run(command, recipe_environment(1, HF_HOME=self.path / "cache"))

    def recipe(self, name: str, ranks: int, **settings: object) -> str:
        """Run examples/NAME.sh, and return what it prints."""
        command = ["bash", REPOSITORY / "examples" / f"{name}.sh"]
        return self._run(command, recipe_environment(ranks, **SMALL | settings))

    def arguments(self, name: str, **settings: object) -> list[str]:
        """Return the arguments with which examples/NAME.sh would start its program."""
        words = shlex.split(self.recipe(name, 1, DRY_RUN=1, **settings))
        programs = [at for at, word in enumerate(words) if word.endswith((".pretrain", ".py"))]
        return [word for word in words[programs[0] + 1 :] if word not in FUSED]

    def scalars(self, run: str, tag: str) -> list[float]:
        """Return the values of a tag that a run has logged, in order."""
        return list(Run(self.path / "checkpoints" / run, [], []).scalars(tag).values())

    def _run(self, command: list[object], environment: dict[str, str]) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
        return done.stdout


def make_model(directory: Path, config: type[PreTrainedConfig], **more: object) -> None:
    """Save a random model in bfloat16, with a real tokenizer, by transformers."""
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(1)
    made = config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **more,
    )
    AutoModelForCausalLM.from_config(made).bfloat16().save_pretrained(directory)


def make_data(at: Directory) -> None:
    """Make a reference mix of documentation, and a pretraining corpus that adds program text."""
    (at.path / "data").mkdir()
    prose = docstrings(["argparse", "ast", "difflib", "inspect", "statistics", "tarfile"])
    code = Path(json.__file__).with_name("decoder.py").read_text().split("\n\n")
    for name, texts in (("docstrings", prose), ("openwebmath", [*prose[:100], *code])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        source = at.write(f"raw/{name}.jsonl", lines)
        at.tool(
            *("preprocess_data", "--input", source, "--output-prefix", f"data/{name}"),
            *("--tokenizer-model", "tokenizer.model", "--append-eod", "--domain", "prose"),
        )
    mix = at.write("mix.yaml", MIX)
    at.tool("build_mix", mix, "--data-root", "data", "--output-prefix", "data/math-reference")


def make_task(at: Directory) -> list[dict[str, str]]:
    """Which word comes next?  In documentation that no corpus has."""
    words = [text.split() for text in docstrings(["string", "typing", "os"])]
    documents = [{"prompt": " ".join(text[:8]), "word": text[8]} for text in words if len(text) > 8]
    at.write("tasks/next_word.yaml", TASK)
    at.write("tasks/next_word.jsonl", "".join(json.dumps(one) + "\n" for one in documents))
    return documents


def perplexity(model: Path, documents: list[dict[str, str]]) -> float:
    """exp of the mean over documents of the word's -log likelihood, by transformers alone."""
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    losses = []
    for document in documents:
        start = len(tokenizer(document["prompt"])["input_ids"])
        ids = torch.tensor(tokenizer(f"{document['prompt']} {document['word']}")["input_ids"])
        with torch.no_grad():
            logits = llama(ids[None]).logits[0]
        losses.append(cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item())
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """Make the corpora, which all models read."""
    made = Directory(tmp_path_factory.mktemp("everything"))
    (made.path / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    make_data(made)
    return made


@pytest.mark.slow
def test_everything(at: Directory) -> None:
    make_model(at.path / "hf", LlamaConfig)
    said = at.tool("convert_checkpoint", "import", "--hf", "hf", "--save", "checkpoints/tinyllama")
    model = next(line for line in said.splitlines() if line.startswith("--"))
    small = f"{model} --split 90,10,0 --eval-iters 1 --num-workers 0"

    at.recipe("train_reference_math", 2, TOKENS=10_000, LR=3e-3, EXTRA=small)
    losses = at.scalars("reference-math-1b", "lm loss")
    assert losses[0] > losses[-1] + 1

    policy = {"TOKENS": STEPS * 16 * 64, "LR": 3e-3, "CACHE": "scores"}
    at.recipe("pretrain_slm_1b", 2, SCORE=1, EXTRA=small, **policy)
    assert not (at.path / "checkpoints" / "slm-math-1b" / "tensorboard").exists()
    (at.path / "checkpoints" / "reference-math-1b").rename(at.path / "not-needed-any-more")

    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    at.recipe("pretrain_slm_1b", 4, EXTRA=f"{small} {layout}", **policy)
    ratios = at.scalars("slm-math-1b", "selected ratio")
    assert ratios == pytest.approx([RATIO] * STEPS, abs=0.005)
    losses = at.scalars("slm-math-1b", "all-token loss")
    assert losses[0] > losses[-1] + 0.5
    assert at.scalars("slm-math-1b", "reference loss")[0] < losses[0]

    export = ["export", "--load", "checkpoints/slm-math-1b", "--hf", "policy-hf", "--like", "hf"]
    at.tool("convert_checkpoint", *export)
    all_weights_moved(at.path / "hf", at.path / "policy-hf")
    documents = make_task(at)
    evaluates_right(at, "policy-hf", documents, is_better(at, "hf", "policy-hf", documents))


@pytest.mark.slow
def test_everything_with_experts(at: Directory) -> None:
    """A Qwen3-MoE, with experts shared out between two ranks; jobs are forked."""
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    more = {"head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]}
    make_model(at.path / "moe-hf", Qwen3MoeConfig, **mixture, **more)
    base, saved = (
        at.path / "checkpoints" / name for name in ("qwen3-30b-a3b", "slm-math-qwen3-30b-a3b")
    )
    imported = run_tool("convert_checkpoint", "import", "--hf", at.path / "moe-hf", "--save", base)
    model = next(line for line in imported.out.splitlines() if line.startswith("--"))
    small = f"{model} --split 90,10,0 --eval-iters 1 --num-workers 0"
    small += " --pipeline-model-parallel-size 1 --tokenizer-type SentencePieceTokenizer"
    alone, shared = (f"{small} --expert-model-parallel-size {size}" for size in (1, 2))
    policy = {"TOKENS": STEPS * 16 * 64, "LR": 3e-3, "CACHE": "moe-scores"}
    policy |= {"TOKENIZER": "tokenizer.model", "RATIO": RATIO}
    reference = policy | {"TOKENS": 10_000, "SIZE": "qwen3-30b-a3b", "EXTRA": shared}
    recipe = "pretrain_slm_qwen3_30b_a3b"
    with serving() as server:
        for tool, ranks, arguments in (
            ("train", 2, at.arguments("train_reference_math", **reference)),
            ("score", 1, at.arguments(recipe, SCORE=1, EXTRA=alone, **policy)),
            ("train", 2, at.arguments(recipe, EXTRA=shared, **policy)),
        ):
            server.run(tool, ranks, arguments, at.path)
    assert at.scalars(saved.name, "selected ratio") == pytest.approx([RATIO] * STEPS, abs=0.005)
    losses = at.scalars(saved.name, "all-token loss")
    assert losses[0] > losses[-1] + 0.5
    assert at.scalars(saved.name, "reference loss")[0] < losses[0]
    # 1 where experts are equally popular.
    assert at.scalars(saved.name, "global_load_balancing_loss")[0] == pytest.approx(1, abs=0.1)

    export = ["export", "--load", saved, "--hf", at.path / "moe-policy-hf"]
    exported = run_tool("convert_checkpoint", *export, "--like", at.path / "moe-hf")
    assert exported.code == 0, exported.err
    all_weights_moved(at.path / "moe-hf", at.path / "moe-policy-hf")
    is_better(at, "moe-hf", "moe-policy-hf", make_task(at))


def all_weights_moved(start: Path, end: Path) -> None:
    """Check that two models have the same tensors, and different values in each."""
    before, after = (load_file(model / "model.safetensors") for model in (start, end))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def is_better(at: Directory, start: str, end: str, documents: list[dict[str, str]]) -> float:
    """Check by the task that a model has learned, and return its perplexity."""
    before, after = (perplexity(at.path / name, documents) for name in (start, end))
    assert math.log(after) < math.log(before) - 0.3
    return after


def evaluates_right(
    at: Directory, model: str, documents: list[dict[str, str]], expected: float
) -> None:
    """Check that the evaluation finds the perplexity that transformers alone finds."""
    local = ["--tasks", "next_word", "--include-path", "tasks", "--output", f"{model}.json"]
    table = at.tool("evaluate", "--model", model, *local, "--device", "cpu")
    (score,) = json.loads((at.path / f"{model}.json").read_text())["scores"]
    assert score["samples"] == len(documents)
    # lm-eval computes in the model's bfloat16.
    assert math.log(score["value"]) == pytest.approx(math.log(expected), abs=0.03)
    row = next(line.split() for line in table.splitlines() if line.startswith("next_word"))
    assert row[1:6] == [
        "0",
        "(default)",
        str(len(documents)),
        "perplexity,none",
        f"{score['value']:.4f}",
    ]
