"""Checkpoints of plain layers in Megatron's Transformer Engine layers, and back.

Without Transformer Engine a stand-in has what its modules keep.  Where it is installed, the real
ones have to keep the same.  That takes no GPU, but the libraries of torch's wheels on
LD_LIBRARY_PATH.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import LLAMA, OPTIMIZER, POLICY, REFERENCE, UNTIED, Corpus
from launch import SUPPORT, launch, pretrain
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.experts import Experts
from random_llama import small_llama, write_random_llama

# In every other layer, beside dense ones.
EXPERTS = """
    --num-experts 4 --moe-layer-freq [0,1,0,1] --moe-ffn-hidden-size 48
    --moe-shared-expert-intermediate-size 24 --moe-token-dispatcher-type alltoall
""".split()

INSTALLED = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


@dataclass
class Loaded:
    """Checkpoints, and what each of the layers said and saved."""

    checkpoints: list[Path]
    source: Path
    runs: dict[str, Any]


@pytest.fixture(scope="module")
def loaded(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Checkpoints that plain layers saved, one of them with experts in some layers, and two that
    were imported, of which the first is that of `source`, and the second has experts too."""
    at = tmp_path_factory.mktemp("engine")
    model = [*POLICY, *LLAMA, *UNTIED, "--qk-layernorm", "--micro-batch-size", "12"]
    saved = []
    for name, more in (("saved", []), ("experts", EXPERTS)):
        run = f"--train-iters 1 --save {at / name} --save-interval 1 --no-save-optim".split()
        arguments = [*corpus.arguments, *model, *more, *OPTIMIZER, *run]
        where = at / f"run-{name}"
        pretrain(1, arguments, where, fresh_threads=1)
        saved.append(at / name / "iter_0000001")
    llama = small_llama(257, 64)
    imported = write_random_llama(at / "random", llama, torch.float32)
    mixed = replace(llama, experts=Experts(4, 2, 128, 0, normed=True, layers=(True, True)))
    mixtral = write_random_llama(at / "mixtral", mixed, torch.float32)
    checkpoints = [saved[0], imported / "release", saved[1], mixtral / "release"]
    return Loaded(checkpoints, at / "random" / "hf", {})


def load(loaded: Loaded, layers: str, at: Path) -> Any:
    """Load them into layers of a kind, once."""
    if layers not in loaded.runs:
        command = [str(SUPPORT / "load_with_te.py"), layers, *map(str, loaded.checkpoints)]
        loaded.runs[layers] = launch(1, command, at / layers, fresh_threads=1)
    return loaded.runs[layers]


def lines(run: Any, word: str) -> list[str]:
    said = run.outputs[0].splitlines()
    return [line.removeprefix(f"{word} ") for line in said if line.startswith(f"{word} ")]


@pytest.mark.parametrize("layers", ["stand-in", pytest.param("real", marks=INSTALLED)])
def test_what_plain_layers_save_and_what_was_imported(
    layers: str, loaded: Loaded, tmp_path: Path
) -> None:
    assert lines(load(loaded, layers, tmp_path), "loaded") == list(map(str, loaded.checkpoints))


@INSTALLED
def test_the_stand_in_keeps_what_the_real_one_keeps(loaded: Loaded, tmp_path: Path) -> None:
    kept = [
        [json.loads(line) for line in lines(load(loaded, layers, tmp_path), "kept")]
        for layers in ("stand-in", "real")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("layers", ["stand-in", pytest.param("real", marks=INSTALLED)])
def test_what_they_save_is_exported(layers: str, loaded: Loaded, tmp_path: Path) -> None:
    """To the tensors that were imported, bit by bit."""
    run = load(loaded, layers, tmp_path)
    target = tmp_path / "exported"
    export_hugging_face(run.directory / "saved1", target, loaded.source, None, 10**9)
    before = load_file(loaded.source / "model.safetensors")
    after = load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


FP8 = "--bf16 --slm-token-ratio 0.6 --slm-reference-fp8 --slm-reference-load"


@INSTALLED
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--micro-batch-size 1 --seq-length 60", "has 60 tokens of a micro-batch on a rank"),
        ("--micro-batch-size 2 --fp8-format hybrid --slm-dump-interval 1", "--slm-dump-interval"),
    ],
)
def test_fp8_that_cannot_be(
    flags: str, said: str, corpus: Corpus, loaded: Loaded, tmp_path: Path
) -> None:
    """Refused before anything is built, where Transformer Engine is there to compute it."""
    model = [*REFERENCE, *LLAMA, *UNTIED, *OPTIMIZER, *corpus.arguments]
    reference = loaded.source.with_name("megatron")
    arguments = [*model, *FP8.split(), str(reference), *"--train-iters 1".split(), *flags.split()]
    run = pretrain(1, [*arguments, "--slm-dump-dir", "dump"], tmp_path / "run", check=False)
    assert run.codes == [2], run.outputs[0][-3000:]
    (line,) = [one for one in run.outputs[0].splitlines() if one.startswith("error: ")]
    assert said in line


DENSE = {"TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"}
DRY_RUNS = {
    "pretrain_slm_1b.sh": DENSE,
    "pretrain_slm_1b.sh --apply-layernorm-1p": DENSE,
    "pretrain_slm_70b.sh --slm-reference-fp8": DENSE,
    "pretrain_slm_qwen3_30b_a3b.sh --fp8-format hybrid": DENSE
    | {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"},
}


@INSTALLED
@pytest.mark.parametrize("recipe", DRY_RUNS)
def test_dry_runs_build_its_layers(recipe: str, tmp_path: Path) -> None:
    """With as many parameters as plain ones, through which a micro-batch is passed."""
    command = [str(SUPPORT / "dry_run_layers.py"), *recipe.split(maxsplit=1)]
    run = launch(1, command, tmp_path, fresh_threads=1)
    (kinds,), (numbers,), (passed,) = (
        lines(run, word) for word in ("layers", "parameters", "passed")
    )
    assert set(kinds.split()) == DRY_RUNS[recipe]
    total, megatron, plain = map(int, numbers.split())
    has_no_plain_ones = "layernorm-1p" in recipe
    assert total == megatron
    assert plain == (0 if has_no_plain_ones else total)
    assert passed == str(not has_no_plain_ones)
