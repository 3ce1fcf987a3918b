"""A run's figures, from what it wrote to TensorBoard (README has the names)."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_slm.analysis.report.figures import figure, line
from megatron_slm.analysis.report.run_files import VALIDATION, RunFiles

# What is drawn, in which colour (figures.py).
LOSSES = {
    "all-token loss": 0,
    "selected loss": 1,
    "unselected loss": 2,
    "reference loss": 3,
}
SELECTED_RATIO = "selected ratio "
WHOLE = {"range": [0, 1.02]}


def run_figures(run: RunFiles) -> list[dict[str, Any]]:
    """Those that the run has values for."""
    found = [
        _of_tags(run, "Loss", "nats a token", _losses(run)),
        _of_tags(run, "Selected part of the tokens", "ratio", {"selected ratio": 1}, yaxis=WHOLE),
        _of_tags(run, "Threshold and excess loss", "nats", {"threshold": 3, "excess loss": 0}),
        *_by_domain(run),
        _throughput(run),
        _of_tags(
            run,
            "Reference's part of a step's time",
            "ratio",
            {"reference time share": 3},
            yaxis=WHOLE,
        ),
    ]
    return [each for each in found if each["data"]]


def run_facts(run: RunFiles) -> list[tuple[str, str]]:
    """What there is to say about a run before its figures: name and value."""
    facts = []
    if iterations := max((series.iterations[-1] for series in run.scalars.values()), default=0):
        facts.append(("iterations", f"{iterations:,}"))
    if run.dumps:
        about = run.dumps[-1].about
        if about.get("score") is not None:
            facts.append(("selection", f"{about['score']}, {about['scope']}"))
    validations = sorted(filter(VALIDATION.fullmatch, run.scalars))
    for tag, name in (
        ("selected ratio", "selected"),
        ("all-token loss", "all-token loss"),
        ("lm loss", "training loss"),
        *((tag, tag.replace("lm loss validation", "validation loss", 1)) for tag in validations),
    ):
        if tag in run.scalars:
            value = run.scalars[tag].last
            facts.append((name, f"{value:.1%}" if tag == "selected ratio" else f"{value:.4f}"))
    if "iteration-time" in run.scalars:
        step = statistics.median(run.scalars["iteration-time"].values)
        facts.append(("step", f"{step:.3g} s"))
    return facts


def _losses(run: RunFiles) -> dict[str, int]:
    """Without a selection there is one training loss."""
    training = LOSSES if "all-token loss" in run.scalars else {"lm loss": 0}
    validations = sorted(filter(VALIDATION.fullmatch, run.scalars))
    return training | {tag: role for role, tag in enumerate(validations, 4)}


def _of_tags(
    run: RunFiles, title: str, y: str, roles: dict[str, int], **layout: Any
) -> dict[str, Any]:
    there = {tag: role for tag, role in roles.items() if tag in run.scalars}
    data = [
        line(tag, run.scalars[tag].iterations, run.scalars[tag].values, role)
        for tag, role in there.items()
    ]
    return figure(title, "iteration", y, data, **layout)


def _by_domain(run: RunFiles) -> list[dict[str, Any]]:
    names = sorted(
        tag.removeprefix(SELECTED_RATIO)
        for tag in run.scalars
        if tag.startswith(SELECTED_RATIO) and not tag.endswith((" validation", " ppl"))
    )
    names = [name for name in names if not name.startswith("validation")]
    figures = []
    for title, what, y in (
        ("Selected part of each domain", "selected ratio", "ratio"),
        ("Loss of the selected tokens of each domain", "selected loss", "nats a token"),
        ("Loss of the unselected tokens of each domain", "unselected loss", "nats a token"),
    ):
        data = [
            line(name, series.iterations, series.values, role)
            for role, name in enumerate(names)
            if (series := run.scalars.get(f"{what} {name}"))
        ]
        figures.append(figure(title, "iteration", y, data))
    return figures


def _throughput(run: RunFiles) -> dict[str, Any]:
    """Tokens a second, where the samples' length is known from the dumps, or samples."""
    times, batches = (run.scalars.get(tag) for tag in ("iteration-time", "batch-size"))
    if times is None or batches is None:
        return figure("Throughput", "iteration", "", [])
    length = run.dumps[0].losses.shape[1] if run.dumps else 1
    unit = "tokens" if run.dumps else "samples"
    sizes = dict(zip(batches.iterations, batches.values, strict=True))
    rates = {
        at: sizes[at] * length / seconds
        for at, seconds in zip(times.iterations, times.values, strict=True)
        if at in sizes
    }
    data = [line(f"{unit} a second", list(rates), list(rates.values()), 2)]
    return figure(
        "Throughput", "iteration", f"{unit} a second", data, yaxis={"rangemode": "tozero"}
    )
