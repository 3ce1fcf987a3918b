"""Megatron's straggler detector times our passes as it does its own."""

from __future__ import annotations

import re
from pathlib import Path

from jobs import LLAMA, OPTIMIZER, POLICY, UNTIED, Corpus
from launch import pretrain


def test_log_straggler(corpus: Corpus, tmp_path: Path) -> None:
    model = [*corpus.arguments, *POLICY, *LLAMA, *UNTIED, *OPTIMIZER, "--micro-batch-size", "12"]
    slm = "--slm-token-ratio 0.5 --slm-score policy --log-interval 1 --train-iters 2".split()
    port = "--straggler-ctrlr-port 0 --logging-level 20".split()
    run = pretrain(1, [*model, *slm, "--log-straggler", *port], tmp_path, fresh_threads=1)
    found = re.findall(r"MnRtt/Rnk: ([0-9.]+)ms", "".join(run.outputs))
    assert len(found) == 2 and all(float(time) > 0 for time in found)
