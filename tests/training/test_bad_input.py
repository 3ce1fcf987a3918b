"""Bad input is refused before the first step: a message that says what to do, exit code 2, on
every rank, without waiting for another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import STEPS, Checkpoints, Corpus
from launch import pretrain


def _missing(reference: Path) -> list[str]:
    shutil.rmtree(reference)
    return []


def _no_tracker(reference: Path) -> list[str]:
    (reference / "latest_checkpointed_iteration.txt").unlink()
    return []


def _truncated(reference: Path) -> list[str]:
    file = reference / "iter_0000010" / "__0_0.distcp"
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size // 2)
    return []


def _part_missing(reference: Path) -> list[str]:
    (reference / "iter_0000010" / "__0_0.distcp").unlink()
    return []


def _no_metadata(reference: Path) -> list[str]:
    (reference / "iter_0000010" / ".metadata").unlink()
    return []


def _damaged_metadata(reference: Path) -> list[str]:
    (reference / "iter_0000010" / ".metadata").write_bytes(b"not a checkpoint")
    return []


CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "reference directory missing": (_missing, "no such directory"),
    "tracker missing": (_no_tracker, "--slm-reference-ckpt-step"),
    "reference truncated": (_truncated, "truncated"),
    "part of the reference missing": (_part_missing, "is missing"),
    "metadata missing": (_no_metadata, "torch_dist"),
    "metadata damaged": (_damaged_metadata, "damaged"),
    "no such iteration": (lambda _: ["--slm-reference-ckpt-step", "7"], "iter_0000007"),
    "another vocabulary": (lambda _: ["--vocab-size", "300"], "vocabulary of 257"),
    "another tokenizer": (lambda _: ["--null-tokenizer-eod-id", "3"], "another tokenizer"),
    "ratio zero": (lambda _: ["--slm-token-ratio", "0"], "(0, 1]"),
    "ratio above one": (lambda _: ["--slm-token-ratio", "1.5"], "(0, 1]"),
    "layers do not divide": (
        lambda _: ["--pipeline-model-parallel-size", "2", "--num-layers", "4"],
        "has 3 layers",
    ),
    "option that cannot be honoured": (
        lambda _: ["--defer-embedding-wgrad-compute"],
        "--defer-embedding-wgrad-compute",
    ),
    "packed sequences": (
        lambda _: ["--dataloader-inter-document-masking"],
        "--dataloader-inter-document-masking",
    ),
    "multi-token prediction": (lambda _: ["--mtp-num-layers", "1"], "--mtp-num-layers"),
    "reset attention mask": (lambda _: ["--reset-attention-mask"], "--reset-attention-mask"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    spoil, message = CASES[case]
    reference = tmp_path / "reference"
    shutil.copytree(untied.reference, reference)
    arguments = [
        *corpus.arguments,
        *untied.arguments,
        *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio 0.6".split(),
        *["--slm-reference-load", str(reference)],
        *spoil(reference),
    ]
    _check_refused(arguments, message, tmp_path / "run")


def test_ratio_without_reference(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    arguments = [
        *corpus.arguments,
        *untied.arguments,
        *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio 0.6".split(),
    ]
    at = arguments.index("--slm-reference-load")
    del arguments[at : at + 2]
    _check_refused(arguments, "--slm-reference-load", tmp_path / "run")


def _check_refused(arguments: list[str], message: str, directory: Path) -> None:
    run = pretrain(2, arguments, directory, check=False, timeout=120)
    assert run.codes == [2, 2], run.outputs[0][-3000:]
    for output in run.outputs:
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in output
        assert "iteration        1/" not in output
