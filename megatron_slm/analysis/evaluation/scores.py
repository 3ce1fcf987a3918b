"""Show scores beside the paper's, as lines of a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.analysis.evaluation.benchmarks import MODELS
from megatron_slm.files import write_whole

if TYPE_CHECKING:  # which imports torch
    from megatron_slm.analysis.evaluation.evaluate import BenchmarkScore


def table_line(*cells: object) -> str:
    """Format a line of the table: task, shots, samples, metric, score, standard error, and the
    paper's four scores."""
    widths = (-24, 11, 7, -28, 7, 7, *(7 for _ in MODELS))
    return " ".join(
        f"{cell!s:{'<' if width < 0 else '>'}{abs(width)}}"
        for cell, width in zip(cells, widths, strict=True)
    )


def table_row(score: BenchmarkScore) -> str:
    """Format the line of a score, with the paper's scores beside it."""
    paper = score.benchmark.paper
    shots = "-" if score.shots is None else str(score.shots)
    return table_line(
        score.task,
        shots if score.benchmark.shots is not None else f"{shots} (default)",
        score.samples,
        score.metric,
        f"{score.value:.4f}",
        "-" if score.stderr is None else f"{score.stderr:.4f}",
        *("-" * len(MODELS) if paper is None else (f"{value / 100:.3f}" for value in paper)),
    )


def _entry(score: BenchmarkScore) -> dict[str, object]:
    """Return a score's entry in the JSON file; the paper's percentages become fractions of 1, and
    NaN and infinity, which JSON does not have, become null."""
    written: dict[str, Any] = {
        key: None if isinstance(value, float) and not isfinite(value) else value
        for key, value in asdict(score).items()
    }
    paper = written.pop("benchmark")["paper"]
    if paper is not None:
        written["paper"] = {
            name: round(value / 100, 3) for name, value in zip(MODELS, paper, strict=True)
        }
    return written


def write_scores(output: Path, model: Path, scores: list[BenchmarkScore]) -> None:
    """Write all scores as JSON, completely or not at all.

    Args:
        output: the file.
        model: directory of the model, which the file names.
        scores: what `evaluate` yielded for all tasks.
    """
    written = {
        "model": str(model),
        "lm_eval": version("lm_eval"),
        "scores": [_entry(score) for score in scores],
    }
    write_whole(output, (json.dumps(written, indent=2) + "\n").encode())
