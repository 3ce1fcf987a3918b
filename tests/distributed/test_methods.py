"""Every scope, score and weighting in some layout, against the oracle."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from distributed.test_layouts import LAYOUTS, RATIO
from torch import Tensor

import oracle
from agreement import agrees_with_oracle, selected_tokens, train_oracle
from jobs import GLOBAL_BATCH, POLICY, STEPS, UNTIED, Checkpoints, Corpus, train_checkpoint
from launch import Run, pretrain

MICRO_BATCH = 3


def run_method(corpus: Corpus, start: Checkpoints, layout: str, flags: str, directory: Path) -> Run:
    ranks, parallel = LAYOUTS[layout]
    arguments = [
        *corpus.arguments,
        *start.arguments,
        *f"--train-iters {STEPS} --micro-batch-size {MICRO_BATCH}".split(),
        *f"--slm-token-ratio {RATIO} {parallel} {flags}".split(),
    ]
    return pretrain(ranks, arguments, directory, module="recorded_pretrain")


CASES = {
    "sequence, cp2": ("cp2", "--slm-scope sequence", {"scope_samples": 1}),
    "data-parallel, dp2": ("dp2", "--slm-scope data-parallel", {"scope_samples": 6}),
    "global batch, pp2 vpp2": (
        "pp2 vpp2",
        "--slm-scope global-batch --slm-global-batch exact",
        {"scope_samples": GLOBAL_BATCH},
    ),
    "global batch, dense head, dp2": (
        "dp2",
        "--slm-scope global-batch --slm-global-batch exact --slm-head dense",
        {"scope_samples": GLOBAL_BATCH},
    ),
    "carried, pp2": ("pp2", "--slm-scope global-batch", {"scope_samples": None}),
    "carried, dp2": ("dp2", "--slm-scope global-batch", {"scope_samples": None}),
    "lowest": ("one rank", "--slm-score lowest", {"score": "lowest"}),
    "reference": ("one rank", "--slm-score reference", {"score": "reference"}),
    "reference entropy, tp2 sp": (
        "tp2 sp",
        "--slm-score reference-entropy",
        {"score": "reference-entropy"},
    ),
    "policy": ("one rank", "--slm-score policy --slm-head dense", {"score": "policy"}),
    "policy entropy, tp2": ("tp2", "--slm-score policy-entropy", {"score": "policy-entropy"}),
    "relu, cp2": ("cp2", "--slm-weighting relu", {"weighting": "relu"}),
    "softmax, tp2 sp": (
        "tp2 sp",
        "--slm-weighting softmax --slm-softmax-temperature 0.5",
        {"weighting": "softmax", "temperature": 0.5},
    ),
    "softmax, dense head": (
        "one rank",
        "--slm-weighting softmax --slm-head dense",
        {"weighting": "softmax"},
    ),
    "dft, tp2 sp": ("tp2 sp", "--slm-weighting dft", {"weighting": "dft"}),
    "mile, cp2": (
        "cp2",
        "--slm-weighting mile --slm-score-option gamma=2",
        {"weighting": "mile", "gamma": 2.0},
    ),
    "eaft, tp2 sp": ("tp2 sp", "--slm-weighting eaft", {"weighting": "eaft"}),
    "longce, global batch, dp2": (
        "dp2",
        "--slm-weighting longce --slm-score-option gamma=3 --slm-scope global-batch "
        "--slm-global-batch exact",
        {"weighting": "longce", "gamma": 3.0, "scope_samples": GLOBAL_BATCH},
    ),
    "context, sequence, pp2 vpp2": (
        "pp2 vpp2",
        "--slm-score context --slm-weighting context --slm-scope sequence",
        {"score": "context", "weighting": "context", "scope_samples": 1},
    ),
    "retrospective, cp2": ("cp2", "--slm-score retrospective", {"score": "retrospective"}),
    "guard, cp2": ("cp2", "--slm-unselected-weight 0.1", {"guard": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_method_agrees_with_oracle(
    case: str,
    corpus: Corpus,
    untied: Checkpoints,
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    layout, flags, changes = CASES[case]
    settings = {"scope_samples": MICRO_BATCH, "micro_batch": MICRO_BATCH} | changes
    expected = train_oracle(untied, samples, validation, oracle.Method(RATIO, **settings))
    run = run_method(corpus, untied, layout, flags, tmp_path)
    agrees_with_oracle(run, expected, MICRO_BATCH)
    if "exact" in flags:
        assert "slm-ranking" in run.outputs[-1]


def test_a_policy_like_qwen(
    corpus: Corpus,
    untied: Checkpoints,
    samples: dict[str, Tensor],
    validation: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """Biases of Qwen2, norms of Qwen3, and heads and a rotary base of their own, against a
    reference without."""
    more = "--add-qkv-bias --qk-layernorm --kv-channels 24".split()
    start = Checkpoints(tmp_path / "policy", untied.reference, False, more, base=500)
    model = [*POLICY, *more, *UNTIED, "--rotary-base", str(start.base)]
    train_checkpoint(corpus, start.policy, model, steps=2)
    method = oracle.Method(RATIO, scope_samples=MICRO_BATCH, micro_batch=MICRO_BATCH)
    expected = train_oracle(start, samples, validation, method)
    run = run_method(corpus, start, "tp2 sp", "", tmp_path / "run")
    agrees_with_oracle(run, expected, MICRO_BATCH)


def test_random_selection_does_not_depend_on_the_layout(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    runs = {
        layout: run_method(corpus, untied, layout, "--slm-score random", tmp_path / str(number))
        for number, layout in enumerate(("one rank", "dp2", "tp2 cp2"))
    }
    chosen = {layout: selected_tokens(run, MICRO_BATCH) for layout, run in runs.items()}
    for number in range(1, STEPS + 1):
        for one, other in itertools.pairwise(chosen.values()):
            assert torch.equal(one[number], other[number])
    first, second = (chosen["one rank"][number] for number in (1, 2))
    assert not torch.equal(first, second)
    for run in runs.values():
        assert run.scalars("selected ratio")[1] == pytest.approx(RATIO, abs=0.01)


def test_warmup_and_schedule(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """Two steps of causal language modeling bit for bit, then the schedule's ratios."""
    warmup = 2 * GLOBAL_BATCH * 64
    flags = (
        f"--slm-warmup-tokens {warmup} --slm-head dense --slm-ratio-schedule linear "
        "--slm-final-token-ratio 0.2 --slm-ratio-decay-iters 4 --eval-interval 2 "
        "--log-validation-ppl-to-tensorboard"
    )
    run = run_method(corpus, untied, "one rank", flags, tmp_path / "warm")
    plain = [*corpus.arguments, *untied.without_reference]
    plain += f"--train-iters {STEPS} --micro-batch-size {MICRO_BATCH}".split()
    expected = pretrain(1, plain, tmp_path / "plain").scalars("lm loss")
    losses = run.scalars("lm loss")
    assert {i: losses[i] for i in (1, 2)} == {i: expected[i] for i in (1, 2)}
    ratios = run.scalars("selected ratio")
    assert set(ratios) == {3, 4, 5}
    for iteration, ratio in {3: 0.4, 4: 0.3, 5: 0.2}.items():
        assert ratios[iteration] == pytest.approx(ratio, abs=0.005)
    # Perplexities are of losses, not of ratios, thresholds and differences of losses.
    losses_alone = {"lm loss", "selected loss", "unselected loss", "all-token loss"}
    losses_alone.add("reference loss")
    said = set(re.findall(r"\| ([a-z -]+) PPL:", run.outputs[-1]))
    assert said == losses_alone
    ppl = {tag.removesuffix(" validation ppl") for tag in run.tags() if tag.endswith(" ppl")}
    assert ppl == losses_alone
    for name in ("selected ratio", "threshold", "excess loss"):
        logged = run.scalars(f"{name} validation")[2]
        assert f"{name} value: {logged:.6E}" in run.outputs[-1]


def test_a_score_of_the_policy_needs_no_reference(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    arguments = [*corpus.arguments, *untied.without_reference]
    arguments += f"--train-iters 2 --micro-batch-size {MICRO_BATCH}".split()
    arguments += "--slm-score policy --slm-token-ratio 0.5".split()
    run = pretrain(1, arguments, tmp_path)
    assert run.scalars("selected loss")[1] > run.scalars("unselected loss")[1]
    assert "excess loss" not in run.tags()
