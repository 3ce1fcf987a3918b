"""Make a study's figures from its results.json: curves of the target loss over tokens and over
compute, and the difference between each arm and the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.report.figures import curve, figure
from megatron_slm.errors import UserError

Seed = dict[str, Any]  # SeedResult of study_file.py
TOKENS, LOSS, POLICY_FLOPS, SCORING_FLOPS = 1, 2, 4, 5  # of a point of a curve


@dataclass(frozen=True)
class Difference:
    """How an arm's loss on a validation set differs from the baseline's, over their seeds."""

    arm: str
    """The arm's name."""

    description: str
    """What it is, in words."""

    validation_set: str | None
    """The set's name; None for the target."""

    mean: float
    """The arm's loss minus the baseline's of the same seed, in nats a token, on average."""

    std: float | None
    """The sample standard deviation; None for a single seed."""


def with_arms(results: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return results with these arms alone, in this order, after the baseline.

    Args:
        results: what read_study returned.
        names: names of arms; none stands for all of them.

    Raises:
        UserError: the study has no such arm.
    """
    known = results["arms"]
    for name in names:
        if name not in known:
            raise UserError(f"--arms {name}: the study has {', '.join(known)}")
    chosen = dict.fromkeys((results["summary"]["baseline"], *(names or known)))
    return results | {"arms": {name: known[name] for name in chosen}}


def study_figure(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figure of the target loss over tokens: each arm's mean over its seeds, with a band
    from the lowest seed to the highest.

    An arm that diverges is cut off; otherwise the others could not be told apart.  A baseline whose
    loss does not change, such as that of a single validation, does not tell what diverges.
    """
    return _loss_figure(results, "tokens seen", lambda _, points: points[:, TOKENS])


def compute_figure(results: dict[str, Any]) -> dict[str, Any]:
    """Return the figure of the target loss over compute, as study_figure does over tokens.

    Compute includes training the references and scoring with them.  It is in units of what the
    baseline takes until all arms are compared, on average over the seeds.

    Raises:
        UserError: the results have no FLOPs.
    """
    baseline = results["summary"]["baseline"]
    seeds = results["arms"][baseline]["seeds"].values()
    unit = mean(sum(_flops(seed).values()) for seed in seeds)

    def compute(seed: Seed, points: NDArray[np.float64]) -> NDArray[np.float64]:
        before = _flops(seed)["reference_training"]
        return (before + points[:, POLICY_FLOPS] + points[:, SCORING_FLOPS]) / unit

    return _loss_figure(results, f"compute, {baseline} = 1", compute)


def _flops(seed: Seed) -> dict[str, int]:
    flops: dict[str, int] = seed.get("flops", {})
    if "reference_training" not in flops or len(seed["curve"][0]) <= SCORING_FLOPS:
        raise UserError(f"results.json has no FLOPs of {seed['directory']}: run the study again")
    return flops


def _loss_figure(
    results: dict[str, Any],
    axis: str,
    position: Callable[[Seed, NDArray[np.float64]], NDArray[np.float64]],
) -> dict[str, Any]:
    """Return the figure of the target loss over what `position` returns of a seed and its points.

    Args:
        results: what read_study returned.
        axis: name of the horizontal axis.
        position: function of a seed's results and of its curve as an array.
    """
    lines, means = [], {}
    for role, (name, arm) in enumerate(results["arms"].items()):
        seeds = arm["seeds"].values()
        length = min(len(seed["curve"]) for seed in seeds)
        curves = [np.asarray(seed["curve"][:length], float) for seed in seeds]
        losses = np.stack([points[:, LOSS] for points in curves])
        places = [position(seed, points) for seed, points in zip(seeds, curves, strict=True)]
        ends = (losses.min(0).tolist(), losses.max(0).tolist()) if len(curves) > 1 else None
        means[name] = losses.mean(0)
        at = np.mean(places, axis=0).tolist()
        lines.append(curve(name, at, means[name].tolist(), role, spread=ends))
    baseline = means[results["summary"]["baseline"]]
    top = 2 * baseline.max() - baseline.min()
    cut = max(map(np.max, means.values())) > top > baseline.min()
    banded = any("low" in each for each in lines)
    return figure(
        "Loss on the target",
        axis,
        "nats a token",
        lines,
        note="Bands go from the lowest seed to the highest." if banded else "",
        top=float(top) if cut else None,
    )


def arm_differences(results: dict[str, Any]) -> list[Difference]:
    """Return the differences of all arms from the baseline where all runs are compared: on the
    target first, and then on each further validation set."""
    arms, baseline = results["arms"], results["summary"]["baseline"]
    base = arms[baseline]["seeds"]
    further = next(iter(base.values())).get("other_losses", {})
    return [
        Difference(arm, own["description"], name, mean(found), stdev(found) if found[1:] else None)
        for arm, own in arms.items()
        if arm != baseline
        for name in (None, *further)
        if (found := _differences(own["seeds"], base, name))
    ]


def _differences(own: dict[str, Seed], base: dict[str, Seed], name: str | None) -> list[float]:
    """Return by how much a set's loss differs with each seed for which both losses are known."""
    pairs = [(_loss(own[seed], name), _loss(base[seed], name)) for seed in own if seed in base]
    return [one - other for one, other in pairs if one is not None and other is not None]


def _loss(seed: Seed, name: str | None) -> float | None:
    loss: float | None
    loss = seed["final_loss"] if name is None else seed.get("other_losses", {}).get(name)
    return loss
