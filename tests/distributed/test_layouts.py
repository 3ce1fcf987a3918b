"""One answer in every layout: losses, selected tokens and gradient norms of the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
from conftest import GLOBAL_BATCH, SEQUENCE, STEPS, VOCABULARY, Checkpoints, Corpus
from launch import Run, pretrain

RATIO = 0.6
# Scores this close to the threshold may fall on either side of it.
NEAR_TIE = 1e-6

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
    untied: Checkpoints,
    tied: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[bool, int], list[oracle.Step]]:
    """By (tied embeddings, micro-batch size)."""
    found = {}
    scratch = tmp_path_factory.mktemp("oracle")
    for start in (untied, tied):
        for micro_batch in (1, 3):
            policy = oracle.llama(
                start.policy / "iter_0000002", scratch, heads=4, groups=2, tied=start.tied
            )
            reference = oracle.llama(
                start.reference / "iter_0000010", scratch, heads=6, groups=6, tied=start.tied
            )
            found[start.tied, micro_batch] = oracle.train(
                policy,
                reference,
                samples,
                steps=STEPS,
                global_batch=GLOBAL_BATCH,
                micro_batch=micro_batch,
                ratio=RATIO,
                vocabulary=VOCABULARY,
            )
    return found


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
    ]
    run = pretrain(ranks, arguments, directory, module="distributed.recorded_pretrain")
    expected = oracles[is_tied, micro_batch]
    logged = {
        tag: run.scalars(tag)
        for tag in (
            "lm loss",
            "selected loss",
            "unselected loss",
            "all-token loss",
            "reference loss",
            "excess loss",
            "selected ratio",
            "threshold",
            "grad-norm",
        )
    }
    chosen = _selected_tokens(run, micro_batch)
    for number, step in enumerate(expected, start=1):
        close = pytest.approx
        assert logged["lm loss"][number] == close(step.lm_loss, rel=1e-5)
        assert logged["selected loss"][number] == close(step.lm_loss, rel=1e-5)
        assert logged["unselected loss"][number] == close(step.unselected_loss, rel=1e-5)
        assert logged["all-token loss"][number] == close(step.all_token_loss, rel=1e-5)
        assert logged["reference loss"][number] == close(step.reference_loss, rel=1e-5)
        assert logged["excess loss"][number] == close(step.excess_loss, rel=1e-5, abs=1e-5)
        assert logged["threshold"][number] == close(
            step.thresholds.mean().item(), rel=1e-5, abs=1e-5
        )
        assert logged["grad-norm"][number] == close(step.grad_norm, rel=1e-5)
        apart = (step.scores - step.thresholds[:, None]).abs() > NEAR_TIE
        assert torch.equal(chosen[number][apart], step.selected[apart])
        assert chosen[number].sum() == step.selected.sum()
        valid = step.selected.sum() / logged["selected ratio"][number]
        assert valid == close(round(valid.item()), rel=1e-6)


def _selected_tokens(run: Run, micro_batch: int) -> dict[int, Tensor]:
    """Selected tokens by iteration, bool [global batch, s], put together from all ranks."""
    whole = {
        number: torch.zeros(GLOBAL_BATCH, SEQUENCE, dtype=torch.bool)
        for number in range(1, STEPS + 1)
    }
    seen: dict[tuple[int, ...], Tensor] = {}
    for file in sorted((run.directory / "recorded").glob("rank*.pt")):
        saved = torch.load(file)
        where = saved["where"]
        assert bool(saved["records"]) == where["last_stage"]
        for record in saved["records"]:
            key = (record["iteration"], record["number"], where["dp"], where["cp"])
            if key in seen:  # tensor-parallel ranks agree to the bit
                assert torch.equal(seen[key], record["selected"])
            seen[key] = record["selected"]
            first = (record["number"] * where["dp_size"] + where["dp"]) * micro_batch
            rows = whole[record["iteration"] + 1][first : first + micro_batch]
            chunks = rows.chunk(2 * where["cp_size"], dim=1)
            mine = (where["cp"], 2 * where["cp_size"] - 1 - where["cp"])
            for chunk, part in zip(mine, record["selected"].chunk(2, dim=1), strict=True):
                chunks[chunk].copy_(part)
    return whole
