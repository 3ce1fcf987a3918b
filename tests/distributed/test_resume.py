"""A run that is stopped and resumed gives the losses of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import Checkpoints, Corpus, from_own_checkpoint
from launch import Run, launch, pretrain

TAGS = ("lm loss", "grad-norm", "threshold", "excess loss")
RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


def _arguments(corpus: Corpus, start: Checkpoints, extra: str) -> list[str]:
    return [
        *corpus.arguments,
        *start.arguments,
        *["--train-iters", "8", "--micro-batch-size", "3", "--slm-token-ratio", "0.6"],
        *extra.split(),
    ]


def _resumed(corpus: Corpus, start: Checkpoints, saved: Path, extra: str) -> list[str]:
    return from_own_checkpoint(_arguments(corpus, start, extra), saved)


@pytest.mark.parametrize(
    ("ranks", "layout", "resumed_in"),
    [
        pytest.param(
            1,
            "",
            ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"],
            id="one rank, then tp2, pp2",
        ),
        pytest.param(2, "--use-distributed-optimizer", [], id="dp2 distopt"),
        pytest.param(
            2,
            "--pipeline-model-parallel-size 2 --slm-scope global-batch",
            ["--slm-scope global-batch"],
            id="pp2 carried threshold, then dp2",
        ),
        pytest.param(
            2,
            RESHARDABLE,
            [f"--tensor-model-parallel-size 2 {RESHARDABLE}"],
            id="dp2 distopt, then tp2",
        ),
    ],
)
def test_resume(
    ranks: int,
    layout: str,
    resumed_in: list[str],
    corpus: Corpus,
    untied: Checkpoints,
    tmp_path: Path,
) -> None:
    straight = pretrain(ranks, _arguments(corpus, untied, layout), tmp_path / "straight")
    saved = tmp_path / "saved"
    stop = f"{layout} --save {saved} --save-interval 4 --exit-interval 4"
    pretrain(ranks, _arguments(corpus, untied, stop), tmp_path / "stopped")
    assert (saved / "iter_0000004" / ".metadata").is_file()
    same = pretrain(ranks, _resumed(corpus, untied, saved, layout), tmp_path / "same")
    for tag in TAGS:
        expected = {i: value for i, value in straight.scalars(tag).items() if i > 4}
        assert len(expected) == 4
        assert same.scalars(tag) == expected  # bit for bit
    for number, other in enumerate(resumed_in):
        run = pretrain(2, _resumed(corpus, untied, saved, other), tmp_path / f"other{number}")
        for tag in TAGS:
            expected = {i: value for i, value in straight.scalars(tag).items() if i > 4}
            assert run.scalars(tag) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_rank_that_reads_an_older_tracker(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """As where a file system is slow to show what is new: Megatron goes by the latest that a rank
    has read, and so do carried thresholds."""
    arguments = _arguments(corpus, untied, "--slm-scope global-batch --eval-iters 0")
    saved = tmp_path / "saved"
    save = f"--save {saved} --save-interval 2 --exit-interval 4"
    pretrain(2, [*arguments, *save.split()], tmp_path / "stopped")
    resumed = from_own_checkpoint(arguments, saved)
    expected = pretrain(2, resumed, tmp_path / "same")
    for rank, iteration in enumerate(("2", "4")):
        own = tmp_path / "apart" / f"node{rank}" / "saved"
        own.mkdir(parents=True)
        for checkpoint in saved.glob("iter_*"):
            (own / checkpoint.name).symlink_to(checkpoint)
        (own / "latest_checkpointed_iteration.txt").write_text(iteration)
    command = ["-m", "megatron_slm.pretrain", "--tensorboard-dir", str(tmp_path / "tensorboard")]
    command += from_own_checkpoint(arguments, Path("saved"))
    launch(2, command, tmp_path / "apart", apart=True)
    found = Run(tmp_path, [], [])
    for tag in TAGS:
        assert found.scalars(tag) == expected.scalars(tag) != {}
