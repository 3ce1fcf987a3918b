"""A study's results.json: arms of several seeds, as a table and as curves with their spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.report.figures import band, figure, line
from megatron_slm.errors import UserError

RESULTS = "results.json"


def read_study(directory: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: not the file that tools/run_experiment.py writes.
    """
    path = directory / RESULTS
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if results.get("format") != 1:
        raise UserError(f"{path} is not of a study that this version knows")
    return results


def run_directories(results: dict[str, Any]) -> list[str]:
    """Of all arms and seeds, relative to the study."""
    return [seed["directory"] for arm in results["arms"].values() for seed in arm["seeds"].values()]


def study_table(results: dict[str, Any]) -> dict[str, Any]:
    """How the arms compare, as tools/run_experiment.py has found: all at one number of tokens, but
    for the columns of equal compute."""
    summary = results["summary"]
    baseline = summary["baseline"]
    arms = summary["arms"]
    means = {name: found["final_loss"]["mean"] for name, found in arms.items()}
    lowest = min(means, key=lambda name: means[name])
    name = baseline.upper()
    return {
        "lead": f"Target: {results['target']}. Compared after "
        f"{summary['compared']['tokens']:,} tokens.",
        "head": [
            "target loss",
            f"minus {name}",
            f"tokens to {name}'s loss",
            "selected",
            f"FLOPs / {name}'s",
            f"loss at {name}'s FLOPs",
        ],
        "rows": [
            {
                "arm": arm,
                "description": results["arms"][arm]["description"],
                "arguments": " ".join(map(str, results["arms"][arm]["arguments"])),
                "lowest": arm == lowest,
                "cells": [
                    _spread(found["final_loss"]),
                    "" if arm == baseline else _spread(found["difference"], "+"),
                    _part(found["part_of_baseline_tokens"]),
                    f"{found['selected_part']['mean']:.0%}",
                    f"{found['flops_ratio']['mean']:.2f}",
                    _spread(found["equal_compute"]["arm_at_baseline_flops"]),
                ],
            }
            for arm, found in arms.items()
        ],
        "verdicts": [found["verdict"] for arm, found in arms.items() if arm != baseline],
    }


def study_figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Target loss over tokens: each arm's mean, between the lowest and the highest of its seeds."""
    bands, means = [], []
    for role, (name, arm) in enumerate(results["arms"].items()):
        curves = [np.asarray(seed["curve"], float) for seed in arm["seeds"].values()]
        length = min(map(len, curves))
        tokens = curves[0][:length, 1].tolist()
        losses = np.stack([curve[:length, 2] for curve in curves])
        if len(curves) > 1:
            bands.append(band(tokens, losses.min(0).tolist(), losses.max(0).tolist(), role))
        means.append(line(name, tokens, losses.mean(0).tolist(), role))
    return [figure("Loss on the target", "tokens seen", "nats a token", [*bands, *means])]


def _spread(values: dict[str, Any], sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    if values["mean"] is None:
        return "not known"
    text = f"{values['mean']:{sign}.4f}"
    return text if values["std"] is None else f"{text} \N{PLUS-MINUS SIGN} {values['std']:.4f}"


def _part(values: dict[str, Any]) -> str:
    missing, seeds = values["missing"], len(values["values"])
    if values["mean"] is None:
        return "not reached"
    return f"{values['mean']:.0%}" + (f" ({seeds - missing} of {seeds} seeds)" if missing else "")
