"""Present a study's results.json: the outcome in words, and tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_slm.analysis.experiments.study_file import read_results
from megatron_slm.analysis.experiments.table import part, score_in_words, score_names, spread
from megatron_slm.analysis.report.facts import Facts, data, model
from megatron_slm.analysis.report.run_files import RunFiles

RESULTS = "results.json"


def read_study(directory: Path) -> dict[str, Any]:
    """Read a study's results.json.

    Raises:
        UserError: it is not a file that tools/run_experiment.py wrote.
    """
    return read_results(directory / RESULTS)


def run_directories(results: dict[str, Any]) -> dict[str, str]:
    """Return the directory of each run, relative to the study's, by the page's name of the run."""
    return {
        f"{arm}, seed {seed}": run["directory"]
        for arm, own in results["arms"].items()
        for seed, run in own["seeds"].items()
    }


def study_view(results: dict[str, Any], runs: list[RunFiles]) -> dict[str, Any]:
    """Return what the first screen shows: the outcome, what was compared, and the tables."""
    summary = results["summary"]
    return {
        **outcome(summary, results["target"] or "the target domain"),
        "baseline": summary["baseline"],
        "several": any(len(arm["seeds"]) > 1 for arm in results["arms"].values()),
        "facts": _facts(results, runs),
        "arms": _arms(results),
        "compute": _at_equal_compute(summary),
    }


def outcome(summary: dict[str, Any], target: str) -> dict[str, str]:
    """Return a headline about the arm with the lowest loss, and how certain it is.

    Args:
        summary: the comparison of the arms (StudySummary in study_file.py).
        target: description of the target domain.
    """
    baseline = summary["baseline"]
    losses = {arm: found["final_loss"]["mean"] for arm, found in summary["arms"].items()}
    others = [arm for arm in losses if arm != baseline and losses[arm] is not None]
    if not others:
        text = f"{baseline} ends at {losses[baseline]:.3f} nats a token on {target}"
        return {"headline": text, "certainty": "There is no other arm to compare it with."}
    best = min(others, key=lambda arm: losses[arm])
    found = summary["arms"][best]
    difference = found["difference"]
    values = [value for value in difference["values"] if value is not None]
    if not values:
        text = f"{best} has the lowest loss on {target}"
        return {"headline": text, "certainty": f"It has no seed in common with {baseline}."}
    told = _sentences(best, baseline, target, values, difference["std"])
    if (cost := found["flops_ratio"]["mean"]) is not None:
        told["certainty"] += f" It took {cost:.2f} times {baseline}'s compute, all that its "
        told["certainty"] += "reference cost included."
    return told


def _sentences(
    best: str, baseline: str, target: str, values: list[float], deviation: float | None
) -> dict[str, str]:
    """Say how an arm differs from the baseline, seed by seed.

    As in the terminal's table, a difference counts only if all seeds agree on its sign and their
    mean exceeds their standard deviation.  A single seed says nothing about chance.

    Args:
        best: name of the arm.
        baseline: name of the baseline.
        target: description of the target domain.
        values: difference in nats a token, for each seed.
        deviation: their standard deviation; None for one seed.
    """
    mean, count = sum(values) / len(values), len(values)
    by = f"{abs(mean):.3f} nats {'below' if mean < 0 else 'above'} {baseline}'s"
    headline = f"{best}'s loss ends {by} on {target}"
    if mean > 0:
        headline = f"No loss ends below {baseline}'s on {target}: the closest, {best}'s, ends {by}"
    share = abs(1 - math.exp(min(mean, 50.0)))
    size = f"Its perplexity is {share:.0%} {'lower' if mean < 0 else 'higher'}. "
    if count == 1:
        return {
            "headline": headline,
            "certainty": f"{size}This is one seed: how much of that is chance is not known.",
        }
    ends = f"from {min(values):+.3f} to {max(values):+.3f}"
    agree = all(value < 0 for value in values) or all(value > 0 for value in values)
    if not agree or abs(mean) <= (deviation or 0.0):
        return {
            "headline": f"{best} and {baseline} cannot be told apart on {target}",
            "certainty": f"The difference is {mean:+.3f} nats on average, {ends} over {count} "
            "seeds: no more than chance explains.",
        }
    seeds = "Both" if count == 2 else f"All {count}"
    return {
        "headline": headline,
        "certainty": f"{size}{seeds} seeds agree: {ends} nats, {mean:+.3f} \u00b1 "
        f"{deviation or 0.0:.3f} (mean and standard deviation).",
    }


def _facts(results: dict[str, Any], runs: list[RunFiles]) -> Facts:
    """Return names and values of what the arms have in common."""
    arms, at = results["arms"], results["summary"]["compared"]
    seeds = max(len(arm["seeds"]) for arm in arms.values())
    known = next((run.settings for run in runs if run.settings.texts), None)
    found = [
        (
            "Compared",
            f"{len(arms)} ways to choose the tokens to train on, from one start and on the same "
            f"data, with {seeds} seed{'s' * (seeds > 1)}",
        ),
        ("Model", "" if known is None else model(known)),
        ("Data", "" if known is None else data(known)),
        ("Training", f"{at['tokens']:,} tokens in each run ({at['iteration']:,} iterations)"),
    ]
    return [(name, value) for name, value in found if value]


def _arms(results: dict[str, Any]) -> dict[str, Any]:
    """Return the table that compares the arms after equal tokens, with a row per arm."""
    summary = results["summary"]
    baseline = summary["baseline"]
    others = summary["arms"][baseline].get("other_losses", {})  # optional in the file
    means = {arm: found["final_loss"]["mean"] for arm, found in summary["arms"].items()}
    lowest = min(means, key=lambda arm: math.inf if means[arm] is None else means[arm])
    return {
        "head": [
            "Loss, nats a token",
            f"Against {baseline}",
            *(f"Loss on {name}" for name in others),
            *score_names(summary),
            "Tokens trained on",
            f"Compute, {baseline} = 1",
            "Time of a step",
        ],
        "rows": [
            {
                "arm": arm,
                "description": results["arms"][arm]["description"],
                "arguments": " ".join(map(str, results["arms"][arm]["arguments"])),
                "lowest": arm == lowest,
                "cells": [
                    spread(found["final_loss"]),
                    "" if arm == baseline else spread(found["difference"], "+"),
                    *(spread(found["other_losses"][name]) for name in others),
                    *(score_in_words(found, name) for name in score_names(summary)),
                    _number(found["selected_part"], ".0%"),
                    _number(found["flops_ratio"], ".2f"),
                    _number(found["step_seconds"], ".3g", " s"),
                ],
            }
            for arm, found in summary["arms"].items()
        ],
    }


def _at_equal_compute(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the table that compares the arms at equal compute, with a row per arm other than the
    baseline."""
    baseline = summary["baseline"]
    return {
        "head": [
            f"Tokens it takes to reach {baseline}'s loss, {baseline} = 100%",
            f"Its loss when stopped at {baseline}'s compute",
            f"{baseline}'s loss if it goes on to the same compute",
        ],
        "rows": [
            {
                "arm": arm,
                "cells": [
                    part(found["part_of_baseline_tokens"]),
                    spread(found["equal_compute"]["arm_at_baseline_flops"]),
                    spread(found["equal_compute"]["baseline_at_arm_flops"]),
                ],
            }
            for arm, found in summary["arms"].items()
            if arm != baseline
        ],
    }


def _number(values: dict[str, Any], form: str, unit: str = "") -> str:
    return "not known" if values["mean"] is None else f"{values['mean']:{form}}{unit}"
