"""Domains of a blend: their own ratios, and what is logged of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import Checkpoints, Corpus, write_dataset
from launch import pretrain
from real_text import docstrings

OWN_RATIO = 0.25
RATIO = 0.6


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, "--tensor-model-parallel-size 2 --slm-scope data-parallel"),
        (2, "--slm-scope data-parallel"),
    ],
)
def test_domain_ratios(
    ranks: int, layout: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    prefix = tmp_path / "email_text_document"
    write_dataset(prefix, docstrings(["argparse", "email/message", "email/policy"]))
    arguments = [*corpus.arguments, *untied.arguments]
    at = arguments.index("--data-path")
    arguments[at + 1 : at + 2] = ["0.5", str(corpus.prefix), "0.5", str(prefix)]
    arguments += f"--train-iters 4 --micro-batch-size 6 --slm-token-ratio {RATIO}".split()
    arguments += f"--slm-domain-ratio email={OWN_RATIO} {layout}".split()
    run = pretrain(ranks, arguments, tmp_path / "run")
    for iteration in range(1, 5):
        values = {
            tag: run.scalars(tag)[iteration]
            for tag in run.tags()
            if " email" in tag or f" {corpus.prefix.name}" in tag or tag == "selected ratio"
            if "samples" not in tag
        }
        own = values["selected ratio email"]
        rest = values[f"selected ratio {corpus.prefix.name}"]
        assert own == pytest.approx(OWN_RATIO, abs=0.01)
        assert rest == pytest.approx(RATIO, abs=0.01)
        assert own < values["selected ratio"] < rest
        assert 0.0 < values["selected loss email"] < 20.0
        assert 0.0 < values[f"unselected loss {corpus.prefix.name}"] < 20.0
