"""A training step makes the host wait for the device where it has to, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documented_score import OPTION, SCORE, write_documented_score
from jobs import Checkpoints, Corpus
from launch import pretrain

# Of each of a step's 2 micro-batches; Megatron's check of a loss, by which it repeats a step.
CHECK = {"objective.py found: tolist": 2}
CASES = {
    "a reference": ("REFERENCE", CHECK),
    # Whose samples' numbers the host has.
    "sequences, by chance": (
        "--slm-scope sequence --slm-score random",
        CHECK | {"scores.py random_scores: tolist": 2},
    ),
    "a warm-up": ("REFERENCE --slm-warmup-tokens 1000000", CHECK),
    "the dense head": ("REFERENCE --slm-head dense", CHECK),
    # Whose ends the loader left in the host's memory.
    "packed documents": (
        "REFERENCE --dataloader-inter-document-masking",
        CHECK | {"micro_batch.py _documents: tolist": 2},
    ),
    # The page's own example, from a file beside the run: it is checked.
    "a user's own score": (
        f"--slm-score {SCORE} --slm-score-option {OPTION}",
        CHECK | {"functions.py _checked: tolist": 2},
    ),
    # What the host cannot know: how many tokens of the step's are this micro-batch's.
    "a step at once": (
        "REFERENCE --slm-scope global-batch --slm-global-batch exact",
        CHECK | {"head.py _rows_that_count: nonzero": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_waits(case: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    flags, expected = CASES[case]
    arguments = [
        *corpus.arguments,
        *untied.without_reference,
        *"--micro-batch-size 6 --train-iters 4 --slm-token-ratio 0.6 --eval-iters 0".split(),
        *flags.replace("REFERENCE", f"--slm-reference-load {untied.reference}").split(),
    ]
    write_documented_score(tmp_path)
    run = pretrain(1, arguments, tmp_path, module="waits_pretrain")
    found = re.findall(r"^wait of ours: (\S+) (.*)", run.outputs[0], re.MULTILINE)
    assert {where: float(number) for number, where in found} == expected
    assert "steps 3" in run.outputs[0]
