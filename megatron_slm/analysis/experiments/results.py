"""Compare the arms of a study with the baseline, seed by seed.

An arm and the baseline have the same start and the same data for each seed.  They are compared at
the last iteration at which every run of the study was validated (`compared`); only the comparison
at equal compute uses the whole curves.  A curve is interpolated linearly between its points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isclose
from statistics import mean, stdev
from typing import Any, NamedTuple

from megatron_slm.analysis.experiments.recipe import BASELINE
from megatron_slm.errors import UserError

SAME_LOSS = 1e-3  # relative: bf16 sums depend on how many threads share them


class Point(NamedTuple):
    """A validation, and what the run had spent until then."""

    iteration: int
    """The iteration after which the run was validated."""

    tokens: int
    """Tokens seen until then."""

    loss: float
    """Loss on the target, in nats a token."""

    selected: int
    """Tokens trained on until then."""

    policy_flops: int
    """FLOPs of the run's own steps until then."""

    scoring_flops: int
    """FLOPs of its references until then."""


Curve = Sequence[Point]


@dataclass(frozen=True)
class RunResult:
    """What a run achieved and what it cost."""

    directory: str
    """The run's directory, relative to the study's."""

    curve: tuple[Point, ...]
    """The run's validations, by ascending iteration."""

    reference_training: int
    """FLOPs that it took to train the run's references."""

    step_seconds: float
    """Mean time of a training step, without validations."""

    first_loss: float | None
    """Loss of all tokens of the first step, in nats; None if it was not logged."""

    others: dict[str, dict[int, float]] = field(default_factory=dict)
    """By name, the loss on each further validation set, in nats a token by iteration."""

    scores: dict[str, float] = field(default_factory=dict)
    """By task and metric, what lm-eval gives the last checkpoint; none without an evaluation."""

    @property
    def final(self) -> Point:
        """The last validation."""
        return self.curve[-1]

    @property
    def flops(self) -> int:
        """FLOPs of the whole run and of its references."""
        return self.flops_at(self.final)

    def flops_at(self, point: Point) -> int:
        """Return the FLOPs of the run up to a point, and of all that it needed before."""
        return self.reference_training + point.policy_flops + point.scoring_flops

    def described(self) -> dict[str, Any]:
        """Return the run's entry in results.json."""
        return {
            "directory": self.directory,
            "final_loss": self.final.loss,
            "tokens_seen": self.final.tokens,
            "tokens_selected": self.final.selected,
            "flops": {
                "policy": self.final.policy_flops,
                "reference_training": self.reference_training,
                "scoring": self.final.scoring_flops,
            },
            "wall_seconds": self.step_seconds * self.final.iteration,
            "first_loss": self.first_loss,
            "other_losses": self.other_losses,
        } | ({"scores": self.scores} if self.scores else {})

    @property
    def other_losses(self) -> dict[str, float | None]:
        """The losses on the further validation sets at the last validation."""
        return {name: losses.get(self.final.iteration) for name, losses in self.others.items()}


Runs = dict[str, dict[int, RunResult]]  # by arm and seed


def cut(run: RunResult, iteration: int) -> RunResult:
    """Return a run as if it had ended at an iteration of its curve."""
    return replace(run, curve=tuple(point for point in run.curve if point.iteration <= iteration))


def compared_at(runs: Runs) -> int:
    """Return the last iteration at which every run was validated.

    Raises:
        UserError: there is no such iteration.
    """
    points = [
        {point.iteration for point in run.curve}
        for seeds in runs.values()
        for run in seeds.values()
    ]
    common = set.intersection(*points)
    if not common:
        raise UserError(
            "there is no iteration at which all arms were validated; give them the same "
            "--eval-interval"
        )
    return max(common)


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Return after how many tokens a curve first is at or below a loss; None if it never is.

    The curve is unknown before its first point, so a loss that it has reached by then counts as
    reached at that point.
    """
    before: Point | None = None
    for point in curve:
        if point.loss <= loss:
            if before is None:
                return float(point.tokens)
            part = (before.loss - loss) / (before.loss - point.loss)
            return before.tokens + part * (point.tokens - before.tokens)
        before = point
    return None


def at_compute(run: RunResult, flops: float) -> float | None:
    """Return a run's target loss when it has taken so many FLOPs, including those of training its
    references; None before the first point of its curve and beyond the last."""
    for before, after in pairwise(run.curve):
        low, high = run.flops_at(before), run.flops_at(after)
        if low <= flops <= high:
            return before.loss + (flops - low) / (high - low) * (after.loss - before.loss)
    return None


def summary(runs: Runs) -> dict[str, Any]:
    """Summarise all arms over the seeds, as results.json has them (study_file.py).

    Losses are in nats a token, and spreads are sample standard deviations.

    Raises:
        UserError: there is no iteration at which every run was validated.
    """
    iteration = compared_at(runs)
    ended = {
        arm: {seed: cut(run, iteration) for seed, run in seeds.items()}
        for arm, seeds in runs.items()
    }
    tokens = next(iter(ended[BASELINE].values())).final.tokens
    return {
        "baseline": BASELINE,
        "compared": {"iteration": iteration, "tokens": tokens},
        "arms": {arm: _arm(arm, runs, ended) for arm in runs},
    }


def _arm(arm: str, runs: Runs, ended: Runs) -> dict[str, Any]:
    own, baseline = ended[arm], ended[BASELINE]
    seeds = [seed for seed in own if seed in baseline]
    reached = [tokens_to_reach(runs[arm][seed].curve, baseline[seed].final.loss) for seed in seeds]
    afforded = [at_compute(runs[arm][seed], baseline[seed].flops) for seed in seeds]
    longer = [at_compute(runs[BASELINE][seed], own[seed].flops) for seed in seeds]
    losses = [own[seed].final.loss for seed in seeds]
    targets = [baseline[seed].final.loss for seed in seeds]
    found: dict[str, Any] = {
        "final_loss": _spread([run.final.loss for run in own.values()]),
        "difference": _spread(_differences(losses, targets)),
        "tokens_to_reach_baseline": _spread(reached),
        "part_of_baseline_tokens": _spread(
            [
                None if tokens is None else tokens / baseline[seed].final.tokens
                for seed, tokens in zip(seeds, reached, strict=True)
            ]
        ),
        "flops_ratio": _spread([own[seed].flops / baseline[seed].flops for seed in seeds]),
        "selected_part": _spread([run.final.selected / run.final.tokens for run in own.values()]),
        "step_seconds": _spread([run.step_seconds for run in own.values()]),
        "other_losses": {
            name: _spread([run.other_losses.get(name) for run in own.values()])
            for name in next(iter(baseline.values())).others
        },
        "equal_compute": {
            "baseline_at_arm_flops": _spread(longer),
            "difference_at_arm_flops": _spread(_differences(losses, longer)),
            "arm_at_baseline_flops": _spread(afforded),
            "difference_at_baseline_flops": _spread(_differences(afforded, targets)),
        },
        "other_start": [seed for seed in seeds if _began_apart(own[seed], baseline[seed])],
    }
    names = dict.fromkeys(name for run in own.values() for name in run.scores)
    if names:
        found["scores"] = {
            name: _spread([run.scores.get(name) for run in own.values()]) for name in names
        }
    return found | {"verdict": verdict(arm, found)}


def _differences(
    values: Sequence[float | None], others: Sequence[float | None]
) -> list[float | None]:
    pairs = zip(values, others, strict=True)
    return [None if one is None or other is None else one - other for one, other in pairs]


def _began_apart(run: RunResult, baseline: RunResult) -> bool:
    """Return whether the first step's loss differs, which means another start or other data."""
    if run.first_loss is None or baseline.first_loss is None:
        return False
    return not isclose(run.first_loss, baseline.first_loss, rel_tol=SAME_LOSS)


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Summarise the values that are known; `missing` counts the others."""
    there = [value for value in values if value is not None]
    return {
        "mean": mean(there) if there else None,
        "std": stdev(there) if len(there) > 1 else None,
        "values": list(values),
        "missing": len(values) - len(there),
    }


def verdict(arm: str, found: dict[str, Any]) -> str:
    """Say in plain words how an arm compares with the baseline.

    Args:
        arm: name of the arm.
        found: summary of the arm (ArmSummary in study_file.py).
    """
    name = BASELINE.upper()
    if arm == BASELINE:
        return f"{name} is what the others are compared with."
    difference = found["difference"]
    count = len(difference["values"])
    seeds = f"with {'all ' * (count > 1)}{count} seed{'s' * (count > 1)}"
    lower = sum(value < 0 for value in difference["values"])
    if lower not in (0, count):
        parts = [f"{arm} is lower with {lower} of {count} seeds only"]
    elif _within_spread(difference):
        parts = [f"{arm} cannot be told from {name} {seeds}"]
    else:
        size = f"{abs(difference['mean']):.4f} nats"
        if count == 1:
            side = "below" if lower else "above"
            parts = [f"{arm} ends {size} {side} {name}, {seeds}: perhaps by chance"]
        else:
            parts = [f"{arm} {'WINS over' if lower else 'LOSES to'} {name} by {size} {seeds}"]
    reached = found["part_of_baseline_tokens"]
    if reached["missing"] == 0:
        parts.append(f"reaches {name}'s final loss with {reached['mean']:.0%} of its tokens")
    else:
        parts.append(
            f"does not reach {name}'s final loss with {reached['missing']} of {count} seeds"
        )
    equal = found["equal_compute"]
    known = [
        f"at {whose} compute it is {_in_words(equal[key])}"
        for whose, key in (
            (f"{name}'s", "difference_at_baseline_flops"),
            ("its own", "difference_at_arm_flops"),
        )
        if not equal[key]["missing"]
    ]
    parts += known or ["at equal compute nothing is known of it"]
    if found["other_start"]:
        parts.append(f"its first step's loss is not {name}'s: another start or other data")
    return "; ".join(parts) + "."


def _within_spread(values: dict[str, Any]) -> bool:
    return bool(abs(values["mean"]) <= (values["std"] or 0.0))


def _in_words(values: dict[str, Any]) -> str:
    lower, count = sum(value < 0 for value in values["values"]), len(values["values"])
    if lower not in (0, count):
        return f"lower with {lower} of {count} seeds only"
    if _within_spread(values):
        return "even"
    return f"{abs(values['mean']):.4f} nats {'lower' if lower else 'higher'}"
