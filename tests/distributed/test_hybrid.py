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
from jobs import STEPS, Checkpoints, Corpus
from launch import Run

RATIO = 0.6
PATTERN = "*-*-*-*-"


@dataclass(frozen=True)
class Case:
    ranks: int
    layout: str = ""
    pattern: str = PATTERN


CASES = {
    "dp2": Case(2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    "tp2 sp": Case(2, "--tensor-model-parallel-size 2 --sequence-parallel --slm-head dense"),
    "pp2": Case(2, "--pipeline-model-parallel-size 2", "*-*-*|-*-"),
    "cp2": Case(2, "--context-parallel-size 2"),
}


def as_hybrid(arguments: list[str], pattern: str) -> list[str]:
    """Return the arguments of a GPT's run with a hybrid model in the GPT's place."""
    at = arguments.index("--num-layers")
    return [*arguments[:at], "--hybrid-layer-pattern", pattern, *arguments[at + 2 :]]


@pytest.mark.parametrize("name", CASES)
def test_hybrid_agrees_with_oracle(
    name: str,
    server: Server,
    corpus: Corpus,
    untied: Checkpoints,
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """Losses, selected tokens, gradient norms and dumps."""
    case = CASES[name]
    arguments = [
        *corpus.arguments,
        *as_hybrid(untied.arguments, case.pattern),
        *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio {RATIO}".split(),
        *"--slm-dump-interval 3 --slm-dump-dir dump --tensorboard-dir tensorboard".split(),
        *case.layout.split(),
    ]
    outputs = server.run("record", case.ranks, arguments, tmp_path)
    run = Run(tmp_path, outputs, [0] * case.ranks)
    method = oracle.Method(RATIO, 3, 3)
    expected = train_oracle(untied, samples, validation, method)
    agrees_with_oracle(run, expected, 3)
    dumps_agree_with_oracle(run, expected, validation, method)
