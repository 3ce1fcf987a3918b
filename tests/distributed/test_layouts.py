"""One answer in every layout: losses, selected tokens, gradient norms and dumps of the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import oracle
from agreement import agrees_with_oracle, dumps_agree_with_oracle, train_oracle
from jobs import STEPS, Checkpoints, Corpus
from launch import pretrain

RATIO = 0.6
LAYOUTS = {
    "one rank": (1, ""),
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2 vpp2": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "cp2": (2, "--context-parallel-size 2"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2 cp2": (4, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
    "dp2 pp2": (4, "--pipeline-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def oracles(
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    untied: Checkpoints,
    tied: Checkpoints,
) -> dict[tuple[bool, int], list[oracle.Step]]:
    """By (tied embeddings, micro-batch size)."""
    return {
        (start.tied, size): train_oracle(
            start, samples, validation, oracle.Method(RATIO, size, size)
        )
        for start in (untied, tied)
        for size in (1, 3)
    }


def test_the_oracle_sees_what_the_paper_needs(
    oracles: dict[tuple[bool, int], list[oracle.Step]], samples: dict[str, Tensor]
) -> None:
    """Masks have holes, and the reference is good enough to disagree with the policy."""
    holes = (samples["loss_mask"] == 0).sum()
    assert 0 < holes < samples["loss_mask"].numel() / 10
    for steps in oracles.values():
        assert steps[0].scores.std() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((False, 1, "", "chunked"), id="untied mb1"),
        pytest.param((True, 3, "--use-distributed-optimizer", "chunked"), id="tied mb3 distopt"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_oracle(
    layout: str,
    options: tuple[bool, int, str, str],
    request: pytest.FixtureRequest,
    corpus: Corpus,
    oracles: dict[tuple[bool, int], list[oracle.Step]],
    tmp_path: Path,
) -> None:
    is_tied, micro_batch, extra, head = options
    _compare(
        layout,
        is_tied,
        micro_batch,
        f"{extra} --slm-head {head}",
        request,
        corpus,
        oracles,
        tmp_path,
    )


@pytest.mark.parametrize("layout", ["dp2", "tp2 sp", "pp2 vpp2", "tp2 cp2"])
def test_dense_head_agrees_with_oracle(
    layout: str,
    request: pytest.FixtureRequest,
    corpus: Corpus,
    oracles: dict[tuple[bool, int], list[oracle.Step]],
    tmp_path: Path,
) -> None:
    _compare(layout, True, 3, "--slm-head dense", request, corpus, oracles, tmp_path)


def test_overlapped_communication_agrees_with_oracle(
    request: pytest.FixtureRequest,
    corpus: Corpus,
    oracles: dict[tuple[bool, int], list[oracle.Step]],
    tmp_path: Path,
) -> None:
    """Parameter gathers are waited for although the output layer is never called."""
    extra = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    _compare("dp2", False, 1, extra, request, corpus, oracles, tmp_path)


def _compare(
    layout: str,
    is_tied: bool,
    micro_batch: int,
    extra: str,
    request: pytest.FixtureRequest,
    corpus: Corpus,
    oracles: dict[tuple[bool, int], list[oracle.Step]],
    directory: Path,
) -> None:
    start: Checkpoints = request.getfixturevalue("tied" if is_tied else "untied")
    ranks, flags = LAYOUTS[layout]
    arguments = [
        *corpus.arguments,
        *start.arguments,
        *f"--train-iters {STEPS} --micro-batch-size {micro_batch}".split(),
        *f"--slm-token-ratio {RATIO} {flags} {extra}".split(),
        *"--slm-dump-interval 3 --slm-dump-dir dump".split(),
    ]
    run = pretrain(ranks, arguments, directory, module="recorded_pretrain")
    expected = oracles[is_tied, micro_batch]
    agrees_with_oracle(run, expected, micro_batch)
    dumps_agree_with_oracle(
        run,
        expected,
        request.getfixturevalue("validation"),
        oracle.Method(RATIO, micro_batch, micro_batch),
    )
