"""A study's results.json: arms of several seeds, as a table and as curves with their spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.experiment_table import COLUMNS, rows, verdicts
from megatron_slm.analysis.report.figures import band, figure, line
from megatron_slm.analysis.study_file import read_results

RESULTS = "results.json"


def read_study(directory: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: not the file that tools/run_experiment.py writes.
    """
    return read_results(directory / RESULTS)


def run_directories(results: dict[str, Any]) -> list[str]:
    """Of all arms and seeds, relative to the study."""
    return [seed["directory"] for arm in results["arms"].values() for seed in arm["seeds"].values()]


def study_table(results: dict[str, Any]) -> dict[str, Any]:
    """How the arms compare, as tools/run_experiment.py prints it."""
    summary = results["summary"]
    means = {arm: found["final_loss"]["mean"] for arm, found in summary["arms"].items()}
    lowest = min(means, key=lambda arm: means[arm])
    return {
        "lead": f"Target: {results['target']}. Compared after "
        f"{summary['compared']['tokens']:,} tokens.",
        "head": COLUMNS[1:],
        "rows": [
            {
                "arm": arm,
                "description": results["arms"][arm]["description"],
                "arguments": " ".join(map(str, results["arms"][arm]["arguments"])),
                "lowest": arm == lowest,
                "cells": cells,
            }
            for arm, *cells in rows(summary)
        ],
        "verdicts": verdicts(summary),
    }


def study_figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Target loss over tokens: each arm's mean, between the lowest and the highest of its seeds.

    An arm that diverges leaves the figure, whose others could not be told apart else.
    """
    bands, means, means_by_arm = [], [], {}
    for role, (name, arm) in enumerate(results["arms"].items()):
        curves = [np.asarray(seed["curve"], float) for seed in arm["seeds"].values()]
        length = min(map(len, curves))
        tokens = curves[0][:length, 1].tolist()
        losses = np.stack([curve[:length, 2] for curve in curves])
        if len(curves) > 1:
            bands.append(band(tokens, losses.min(0).tolist(), losses.max(0).tolist(), role))
        means_by_arm[name] = losses.mean(0)
        means.append(line(name, tokens, means_by_arm[name].tolist(), role))
    baseline = means_by_arm[results["summary"]["baseline"]]
    low = min(map(np.min, means_by_arm.values()))
    top = 2 * baseline.max() - baseline.min()
    title, axis = "Loss on the target", {}
    if max(map(np.max, means_by_arm.values())) > top:
        title += " (cut at the top; a double click shows all)"
        axis = {"range": [float(low - 0.05 * (top - low)), float(top)]}
    return [figure(title, "tokens seen", "nats a token", [*bands, *means], yaxis=axis)]
