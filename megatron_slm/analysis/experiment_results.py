"""Arms compared with the baseline, seed by seed: each pair had one start and the same data.

All is said of the last iteration that every run of the study has reached (`compared`), but for the
comparison at equal compute, which uses all of the curves.  Between its points a curve is a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from megatron_slm.analysis.experiment_recipe import BASELINE
from megatron_slm.errors import UserError

Curve = Sequence[tuple[int, int, float]]


@dataclass(frozen=True)
class RunResult:
    """curve: (iteration, tokens, target loss in nats), rising.
    flops: of its whole length, by part.
    wall_seconds: of training steps alone.
    """

    directory: str
    curve: tuple[tuple[int, int, float], ...]
    tokens_seen: int
    tokens_selected: int
    flops: dict[str, int]
    wall_seconds: float

    @property
    def final_loss(self) -> float:
        return self.curve[-1][2]


Runs = dict[str, dict[int, RunResult]]  # by arm and seed


def cut(run: RunResult, iteration: int) -> RunResult:
    """The run as if it had ended at a point of its curve; costs in proportion."""
    points = tuple(point for point in run.curve if point[0] <= iteration)
    tokens = points[-1][1]
    part = tokens / run.tokens_seen
    return RunResult(
        directory=run.directory,
        curve=points,
        tokens_seen=tokens,
        tokens_selected=round(run.tokens_selected * part),
        flops={
            name: flops if name == "reference_training" else round(flops * part)
            for name, flops in run.flops.items()
        },
        wall_seconds=run.wall_seconds * part,
    )


def compared_at(runs: Runs) -> int:
    """The last iteration at which all runs have been validated.

    Raises:
        UserError: there is none.
    """
    points = [
        {point[0] for point in run.curve} for seeds in runs.values() for run in seeds.values()
    ]
    common = set.intersection(*points)
    if not common:
        raise UserError("no iteration at which all arms were validated: see --eval-interval")
    return max(common)


def tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """Tokens at which the curve first is at or below a loss; None if it never is.

    Before the first point the curve is not known: a loss that it reaches by then counts as reached
    there.
    """
    before: tuple[int, int, float] | None = None
    for point in curve:
        if point[2] <= loss:
            if before is None:
                return float(point[1])
            part = (before[2] - loss) / (before[2] - point[2])
            return before[1] + part * (point[1] - before[1])
        before = point
    return None


def loss_at(curve: Curve, tokens: float) -> float | None:
    """Target loss after so many tokens; None before the first point and beyond the last."""
    for before, after in pairwise(curve):
        if before[1] <= tokens <= after[1]:
            part = (tokens - before[1]) / (after[1] - before[1])
            return before[2] + part * (after[2] - before[2])
    return None


def at_compute(run: RunResult, flops: float) -> float | None:
    """Target loss when a run, with all it needed before, has taken so many FLOPs; None where its
    curve does not go."""
    before = run.flops["reference_training"]
    each = (sum(run.flops.values()) - before) / run.tokens_seen
    return loss_at(run.curve, (flops - before) / each)


def summary(runs: Runs) -> dict[str, Any]:
    """Of all arms, over the seeds; losses in nats, spreads are standard deviations of a sample."""
    iteration = compared_at(runs)
    ended = {
        arm: {seed: cut(run, iteration) for seed, run in seeds.items()}
        for arm, seeds in runs.items()
    }
    tokens = next(iter(ended[BASELINE].values())).tokens_seen
    return {
        "baseline": BASELINE,
        "compared": {"iteration": iteration, "tokens": tokens},
        "arms": {arm: _arm(arm, runs, ended) for arm in runs},
    }


def _arm(arm: str, runs: Runs, ended: Runs) -> dict[str, Any]:
    own, baseline = ended[arm], ended[BASELINE]
    seeds = [seed for seed in own if seed in baseline]
    reached = [tokens_to_reach(runs[arm][seed].curve, baseline[seed].final_loss) for seed in seeds]
    total = {seed: sum(own[seed].flops.values()) for seed in seeds}
    budget = {seed: sum(baseline[seed].flops.values()) for seed in seeds}
    afforded = [at_compute(runs[arm][seed], budget[seed]) for seed in seeds]
    found: dict[str, Any] = {
        "final_loss": _spread([run.final_loss for run in own.values()]),
        "difference": _spread([own[seed].final_loss - baseline[seed].final_loss for seed in seeds]),
        "tokens_to_reach_baseline": _spread(reached),
        "part_of_baseline_tokens": _spread(
            [
                None if tokens is None else tokens / baseline[seed].tokens_seen
                for seed, tokens in zip(seeds, reached, strict=True)
            ]
        ),
        "flops_ratio": _spread([total[seed] / budget[seed] for seed in seeds]),
        "selected_part": _spread([run.tokens_selected / run.tokens_seen for run in own.values()]),
        "equal_compute": {
            "baseline_at_arm_flops": _spread(
                [at_compute(runs[BASELINE][seed], total[seed]) for seed in seeds]
            ),
            "arm_at_baseline_flops": _spread(afforded),
            "difference_at_baseline_flops": _spread(
                [
                    None if loss is None else loss - baseline[seed].final_loss
                    for seed, loss in zip(seeds, afforded, strict=True)
                ]
            ),
        },
    }
    return found | {"verdict": verdict(arm, found)}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Of the values that there are; `missing` counts the others."""
    there = [value for value in values if value is not None]
    return {
        "mean": mean(there) if there else None,
        "std": stdev(there) if len(there) > 1 else None,
        "values": list(values),
        "missing": len(values) - len(there),
    }


def verdict(arm: str, found: dict[str, Any]) -> str:
    """How an arm compares with the baseline, in plain words."""
    name = BASELINE.upper()
    if arm == BASELINE:
        return f"{name} is what the others are compared with."
    equal = found["equal_compute"]["difference_at_baseline_flops"]
    parts = [_compared(arm, name, found["difference"]["values"])]
    reached = found["part_of_baseline_tokens"]
    seeds = len(reached["values"])
    if reached["missing"] == 0:
        parts.append(f"reaches {name}'s final loss with {reached['mean']:.0%} of its tokens")
    else:
        parts.append(
            f"does not reach {name}'s final loss with {reached['missing']} of {seeds} seeds"
        )
    if equal["mean"] is not None and not equal["missing"]:
        parts.append(f"at {name}'s compute {_compared('it', 'it', equal['values'], brief=True)}")
    else:
        parts.append(f"at {name}'s compute nothing is known of it")
    return "; ".join(parts) + "."


def _compared(arm: str, name: str, values: Sequence[float], brief: bool = False) -> str:
    lower, count = sum(value < 0 for value in values), len(values)
    size = f"{abs(mean(values)):.4f} nats"
    seeds = "" if brief else f" with {'all ' * (count > 1)}{count} seed{'s' * (count > 1)}"
    if lower == count:
        return f"is {size} lower" if brief else f"{arm} WINS over {name} by {size}{seeds}"
    if lower == 0:
        return f"is {size} higher" if brief else f"{arm} LOSES to {name} by {size}{seeds}"
    return f"{'' if brief else arm + ' '}is lower with {lower} of {count} seeds only"
