"""Domains of a blend: their own ratios, and what is logged of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs import Checkpoints, Corpus, write_dataset
from launch import pretrain
from megatron_slm.data.token_dump import read_dumps
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
    dump = "--slm-dump-interval 4 --slm-dump-dir dump --slm-dump-samples 7 --slm-dump-train-samples"
    run = pretrain(ranks, [*arguments, *dump.split()], tmp_path / "run")
    dumps_are_of_the_blend(
        run.directory / "dump", {"email": prefix, corpus.prefix.name: corpus.prefix}
    )
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


def dumps_are_of_the_blend(dump: Path, prefixes: dict[str, Path]) -> None:
    """Check that the dumps have training samples, half from each domain."""
    first, last = read_dumps(dump)
    assert (first.iteration, last.iteration) == (0, 4)
    assert last.about.split == "train"
    domains = last.about.domains
    assert len(last.tokens) == len(domains) == 7
    assert sorted(map(domains.count, prefixes)) == [3, 4]
    texts = {name: np.fromfile(f"{prefix}.bin", np.uint16) for name, prefix in prefixes.items()}
    there = []  # the first tokens, lest a sample has several documents, in each domain's text
    for ids in last.tokens.astype(np.uint16):
        there.append({name for name in texts if ids[:24].tobytes() in texts[name].tobytes()})
    assert all(domain in found for domain, found in zip(domains, there, strict=True))
    assert {"email"} in there and len({frozenset(found) for found in there}) > 1
