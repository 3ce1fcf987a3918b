"""With k = 100% the dense head is Megatron's causal language modeling, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import LLAMA, OPTIMIZER, POLICY, UNTIED, Checkpoints, Corpus
from launch import Run, pretrain

LAYOUTS = {
    "one rank": (1, ""),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
}
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_ratio_is_bitwise_causal_language_modeling(
    layout: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Also with dropout: a reference or a dump that drew a single random number would change the
    masks."""
    ranks, flags = LAYOUTS[layout]
    common = [
        *corpus.arguments,
        *POLICY,
        *LLAMA,
        *UNTIED,
        *OPTIMIZER,
        *DROPOUT,
        *f"--train-iters 5 --micro-batch-size 3 --eval-interval 2 {flags}".split(),
    ]
    reference = ["--slm-reference-load", str(untied.reference), "--slm-head", "dense"]
    reference += ["--slm-token-ratio", "1"]
    megatron = pretrain(ranks, common, tmp_path / "megatron", module="megatron_pretrain")
    plain = pretrain(ranks, common, tmp_path / "plain")
    dump = ["--slm-dump-interval", "1", "--slm-dump-dir", "dump"]
    full = pretrain(ranks, [*common, *reference, *dump], tmp_path / "full")
    # Validation after steps 2 and 4; another after the last step comes when the log may be closed.
    for tag, steps in (("lm loss", 5), ("grad-norm", 5), ("lm loss validation", 4)):
        expected = _until(megatron, tag, steps)
        assert len(expected) >= 2
        assert _until(plain, tag, steps) == expected
        assert _until(full, tag, steps) == expected


def _until(run: Run, tag: str, steps: int) -> dict[int, float]:
    return {step: value for step, value in run.scalars(tag).items() if step <= steps}


def test_chunked_head_at_full_ratio(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    common = [
        *corpus.arguments,
        *untied.arguments,
        *["--train-iters", "4", "--micro-batch-size", "3", "--slm-token-ratio", "1"],
    ]
    dense = pretrain(1, [*common, "--slm-head", "dense"], tmp_path / "dense")
    chunked = pretrain(1, [*common, "--slm-head", "chunked"], tmp_path / "chunked")
    for tag in ("lm loss", "grad-norm"):
        expected = list(dense.scalars(tag).values())
        assert list(chunked.scalars(tag).values()) == pytest.approx(expected, rel=1e-6)
