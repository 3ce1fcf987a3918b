"""Ratio schedules, random scores, soft weights, the guard and the carried threshold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from megatron_slm.selection import (
    CarriedThreshold,
    Ranks,
    RatioSchedule,
    SelectionSettings,
    TokenSelector,
    random_scores,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(distributed.group.WORLD, distributed.group.WORLD, 0, 1)
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (RatioSchedule(0.6), {0: 0.6, 1000: 0.6}),
        (RatioSchedule(0.8, "linear", 0.6, 10), {0: 0.8, 5: 0.7, 10: 0.6, 99: 0.6}),
        (RatioSchedule(0.8, "cosine", 0.6, 10), {0: 0.8, 5: 0.7, 10: 0.6, 99: 0.6}),
        (
            RatioSchedule(1.0, "steps", steps=((5, 0.8), (9, 0.6))),
            {0: 1.0, 4: 1.0, 5: 0.8, 8: 0.8, 9: 0.6, 99: 0.6},
        ),
    ],
)
def test_ratio_schedule(schedule: RatioSchedule, expected: dict[int, float]) -> None:
    assert {i: schedule.at(i) for i in expected} == pytest.approx(expected)


def test_cosine_is_slow_at_both_ends() -> None:
    ratios = [RatioSchedule(0.8, "cosine", 0.6, 100).at(i) for i in range(101)]
    steps = [a - b for a, b in pairwise(ratios)]
    assert steps[0] < steps[49] / 10 and steps[-1] < steps[49] / 10


def test_random_scores_depend_on_seed_iteration_and_sample_alone() -> None:
    cpu = torch.device("cpu")
    whole = random_scores(1, 7, torch.arange(8), 50, cpu)
    assert torch.equal(random_scores(1, 7, torch.tensor([5, 2]), 50, cpu), whole[[5, 2]])
    for seed, iteration in ((2, 7), (1, 8)):
        assert not torch.equal(random_scores(seed, iteration, torch.arange(8), 50, cpu), whole)
    assert len(whole.unique()) > 390
    assert 0.4 < whole.mean() < 0.6


SCORE = st.integers(-40, 40).map(lambda tenths: tenths / 10)
ROWS = st.lists(st.lists(SCORE, min_size=6, max_size=6), min_size=1, max_size=4)


@settings(deadline=None)
@given(ROWS, st.sampled_from(["relu", "softmax"]), st.sampled_from(["sequence", "micro-batch"]))
def test_soft_weights(ranks: Ranks, rows: list[list[float]], weighting: str, scope: str) -> None:
    scores = torch.tensor(rows)
    valid = torch.ones_like(scores).bool()
    valid[:, 2] = False
    chosen_by = SelectionSettings(scope=scope, weighting=weighting, temperature=0.5)
    choice = TokenSelector(chosen_by, ranks).choose(scores, valid, 0.6)
    weights = choice.weights.double()
    groups = [[i] for i in range(len(rows))] if scope == "sequence" else [list(range(len(rows)))]
    for group in groups:
        some, where = scores[group].double(), valid[group]
        raw = some.clamp(min=0) if weighting == "relu" else ((some - some.max()) / 0.5).exp()
        raw = raw * where
        count = choice.selected[group].sum()
        expected = raw * count / raw.sum() if raw.sum() > 0 else choice.selected[group].double()
        torch.testing.assert_close(weights[group], expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(ROWS, st.floats(0.01, 1.0))
def test_guard_adds_the_mean_of_the_unselected(
    ranks: Ranks, rows: list[list[float]], guard: float
) -> None:
    scores = torch.tensor(rows)
    valid = torch.ones_like(scores).bool()
    losses = torch.rand_like(scores)
    chosen_by = SelectionSettings(unselected_weight=guard)
    choice = TokenSelector(chosen_by, ranks).choose(scores, valid, 0.6)
    objective = (choice.weights * losses).sum() / choice.selected.sum()
    expected = losses[choice.selected].mean() + guard * losses[~choice.selected].mean()
    torch.testing.assert_close(objective, expected, rtol=1e-4, atol=1e-5)


def test_carried_threshold_realises_the_ratio(ranks: Ranks) -> None:
    """Within a percentage point after 20 steps of stationary scores, and not by being exact."""
    selector = TokenSelector(SelectionSettings(scope="global-batch"), ranks)
    carried = CarriedThreshold()
    draw = torch.Generator().manual_seed(0)
    realised = []
    for iteration in range(60):
        scores = torch.randn(32, 2048, generator=draw)
        valid = torch.rand(32, 2048, generator=draw) > 0.1
        thresholds = carried.before(iteration)
        if thresholds is None:
            choice = selector.choose(scores, valid, 0.6)
        else:
            choice = selector.choose_above(scores, valid, torch.tensor(thresholds), None)
        realised.append((choice.selected.sum() / valid.sum()).item())
        selection = selector.select_from_step(scores, valid, 0.6, None, 4)
        carried.after(iteration, selection.threshold.tolist(), [True])
    assert all(abs(ratio - 0.6) < 0.01 for ratio in realised[20:])
    assert len(set(realised[20:])) > 10


def test_carried_threshold_takes_a_repeated_step_once() -> None:
    once, twice = CarriedThreshold(), CarriedThreshold()
    for carried, repeats in ((once, 1), (twice, 3)):
        for iteration in range(4):
            for repeat in range(repeats):
                carried.before(iteration)
                wrong = 100.0 if repeat < repeats - 1 else 0.0  # a faulty run, then the right one
                carried.after(iteration, [iteration + wrong, 5.0], [True, iteration != 2])
    assert once.before(4) == twice.before(4)


def test_carried_threshold_begins_when_all_sets_had_tokens() -> None:
    carried = CarriedThreshold()
    carried.after(0, [1.0, 0.0], [True, False])
    assert carried.before(1) is None
    carried.after(1, [1.0, 2.0], [True, True])
    assert carried.before(2) == (1.0, 2.0)


def test_carried_threshold_survives_a_checkpoint() -> None:
    straight = CarriedThreshold()
    for iteration in range(8):
        straight.before(iteration)
        straight.after(iteration, [iteration / 3], [True])
        if iteration == 3:
            state = straight.state()
    resumed = CarriedThreshold.from_state(state)
    for iteration in range(4, 8):
        resumed.before(iteration)
        resumed.after(iteration, [iteration / 3], [True])
    assert resumed.state() == straight.state()
    assert CarriedThreshold.from_state(CarriedThreshold().state()).before(0) is None
