"""Megatron's HybridModel: with layers of attention and of MLPs alone it is a GPT, and the oracle is
transformers' Llama.  Its weights come from a GPT's checkpoint, as Megatron migrates them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

import oracle
from agreement import agrees_with_oracle, dumps_agree_with_oracle, train_oracle
from forked_jobs import Server
from jobs import (
    LLAMA,
    OPTIMIZER,
    REFERENCE,
    STEPS,
    UNTIED,
    Checkpoints,
    Corpus,
    as_hybrid,
    from_own_checkpoint,
)
from launch import Run

METHOD = oracle.Method(0.6, 3, 3)
POLICY = "*-*-*-*-"
LOGGED = ("lm loss", "excess loss", "grad-norm")


@dataclass(frozen=True)
class Case:
    """policy, reference: whether each is a hybrid model."""

    ranks: int
    layout: str
    policy: bool = True
    reference: bool = True
    pattern: str = POLICY


CASES = {
    "dp2": Case(
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        reference=False,
    ),
    "tp2 sp": Case(2, "--tensor-model-parallel-size 2 --sequence-parallel --slm-reference-offload"),
    "pp2 vpp2": Case(2, "--pipeline-model-parallel-size 2", pattern="*-*|-|*|-*-"),
    "cp2": Case(2, "--context-parallel-size 2 --slm-head dense"),
    "of a gpt": Case(1, "", policy=False),
}


@pytest.fixture(scope="module")
def reference(
    server: Server, corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The weights of the GPT's reference in the checkpoint of a hybrid model."""
    made = tmp_path_factory.mktemp("hybrid") / "reference"
    start = f"--load {untied.reference} --finetune --no-load-optim --no-load-rng --lr 0"
    arguments = [
        *corpus.arguments,
        *as_hybrid([*REFERENCE, *LLAMA, *UNTIED, *OPTIMIZER], "*-*-"),
        *f"{start} --train-iters 1 --micro-batch-size 12 --save {made} --save-interval 1".split(),
    ]
    server.run("train", 1, arguments, made.parent / "run")
    return made


@pytest.fixture(scope="module")
def expected(
    untied: Checkpoints, samples: dict[str, Tensor], validation: dict[str, Tensor]
) -> list[oracle.Step]:
    return train_oracle(untied, samples, validation, METHOD)


@pytest.mark.parametrize("name", CASES)
def test_hybrid_agrees_with_oracle(
    name: str,
    server: Server,
    corpus: Corpus,
    untied: Checkpoints,
    reference: Path,
    expected: list[oracle.Step],
    validation: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """Losses, selected tokens, gradient norms and dumps."""
    case = CASES[name]
    model = untied.without_reference
    arguments = [
        *corpus.arguments,
        *(as_hybrid(model, case.pattern) if case.policy else model),
        *f"--slm-reference-load {reference if case.reference else untied.reference}".split(),
        *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio {METHOD.ratio}".split(),
        *"--slm-dump-interval 3 --slm-dump-dir dump --tensorboard-dir tensorboard".split(),
        *case.layout.split(),
    ]
    outputs = server.run("record", case.ranks, arguments, tmp_path)
    run = Run(tmp_path, outputs, [0] * case.ranks)
    agrees_with_oracle(run, expected, 3)
    dumps_agree_with_oracle(run, expected, validation, METHOD)


def test_goes_on_from_a_gpt(
    server: Server, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """With the optimizer's state and the moving average, and then from its own checkpoint."""
    gpt = [
        *corpus.arguments,
        *untied.without_reference,
        *"--slm-reference ema:0.5 --slm-token-ratio 0.6 --micro-batch-size 3".split(),
        *f"--train-iters {STEPS} --tensorboard-dir tensorboard".split(),
    ]
    hybrid = from_own_checkpoint(as_hybrid(gpt, POLICY), Path("saved"))
    save = "--save saved --save-interval 2 --exit-interval".split()
    server.run("train", 1, gpt, tmp_path / "whole")
    server.run("train", 1, [*gpt, *save, "2"], tmp_path / "parts")
    pp2 = ["--pipeline-model-parallel-size", "2"]
    server.run("train", 2, [*hybrid, *pp2, *save, "4"], tmp_path / "parts")
    server.run("train", 1, hybrid, tmp_path / "parts")
    whole, parts = (Run(tmp_path / name, [], []) for name in ("whole", "parts"))
    for tag in LOGGED:
        found = parts.scalars(tag)
        assert list(found) == list(range(1, STEPS + 1))
        assert found == pytest.approx(whole.scalars(tag), rel=1e-5, abs=1e-6)


def test_full_ratio_is_bitwise_the_model_s_own_loss(
    server: Server, corpus: Corpus, untied: Checkpoints, reference: Path, tmp_path: Path
) -> None:
    """Without a reference, nothing is asked of the model but its own loss."""
    plain = [
        *corpus.arguments,
        *as_hybrid(untied.without_reference, POLICY),
        *"--train-iters 3 --micro-batch-size 3 --tensorboard-dir tensorboard".split(),
    ]
    full = f"--slm-reference-load {reference} --slm-token-ratio 1 --slm-head dense".split()
    server.run("train", 1, plain, tmp_path / "plain")
    server.run("train", 1, [*plain, *full], tmp_path / "full")
    for tag in ("lm loss", "grad-norm"):
        expected, found = (Run(tmp_path / run, [], []).scalars(tag) for run in ("plain", "full"))
        assert found == expected != {}
