"""A study's results.json: arms of several seeds, as a table and as curves with their spread."""

from __future__ import annotations

import json
import statistics
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
    if results.get("format") != 1 or "arms" not in results:
        raise UserError(f"{path} is not of a study that this version knows")
    return results


def run_directories(results: dict[str, Any]) -> list[str]:
    """Of all arms and seeds, relative to the study."""
    return [seed["directory"] for arm in results["arms"].values() for seed in arm["seeds"].values()]


def arm_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """The table's rows: means over seeds, spreads as standard deviations."""
    rows = []
    finished = {name: list(arm["seeds"].values()) for name, arm in results["arms"].items()}
    losses = {
        name: [seed["final_loss"] for seed in seeds] for name, seeds in finished.items() if seeds
    }
    best = min(losses, key=lambda name: statistics.mean(losses[name]), default=None)
    for name, arm in results["arms"].items():
        seeds = finished[name]
        if not seeds:
            continue
        rows.append(
            {
                "arm": name,
                "description": arm.get("description", ""),
                "arguments": " ".join(map(str, arm.get("arguments", []))),
                "seeds": str(len(seeds)),
                "loss": with_spread(losses[name]),
                "best": "lowest" if name == best else "",
                "tokens": short(_mean(seeds, "tokens_seen")),
                "selected": short(_mean(seeds, "tokens_selected")),
                "flops": short(statistics.mean(sum(seed["flops"].values()) for seed in seeds)),
                "wall": f"{_mean(seeds, 'wall_seconds'):,.0f}",
            }
        )
    return rows


def study_figures(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Target loss over tokens: each arm's mean, between the lowest and the highest of its seeds."""
    bands, means = [], []
    for role, (name, arm) in enumerate(results["arms"].items()):
        curves = [np.asarray(seed["curve"], float) for seed in arm["seeds"].values()]
        curves = [curve for curve in curves if curve.ndim == 2 and len(curve)]
        if not curves:
            continue
        length = min(map(len, curves))
        tokens = curves[0][:length, 1].tolist()
        losses = np.stack([curve[:length, 2] for curve in curves])
        if len(curves) > 1:
            bands.append(band(tokens, losses.min(0).tolist(), losses.max(0).tolist(), role))
        means.append(line(name, tokens, losses.mean(0).tolist(), role))
    return [figure("Loss on the target", "tokens seen", "nats a token", [*bands, *means])]


def with_spread(values: list[float]) -> str:
    """Mean, and the standard deviation of several."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} \N{PLUS-MINUS SIGN} {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def short(value: float) -> str:
    """Three digits and a unit: 1.31M, 2.4e+15."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if limit <= value < 1000 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _mean(seeds: list[dict[str, Any]], what: str) -> float:
    return statistics.mean(float(seed[what]) for seed in seeds)
