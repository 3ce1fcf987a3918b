"""Make a run's figures from the scalars that it wrote to TensorBoard."""

from __future__ import annotations

import re
import statistics
from typing import Any

from megatron_slm.analysis.report.facts import score_of, spelt_out, validation_tags
from megatron_slm.analysis.report.figures import curve, figure
from megatron_slm.analysis.report.run_files import RunFiles

# The losses drawn, and the role (figures.py) that gives each its colour.
LOSSES = {
    "all-token loss": 0,
    "selected loss": 1,
    "unselected loss": 2,
    "reference loss": 3,
}
SELECTED_RATIO = "selected ratio "
NATS = "nats a token"
PERCENT = "% of the tokens"
WHOLE = (0.0, 102.0)
# What Megatron appends to the name of a scalar of validation.
OF_VALIDATION = re.compile(r"(?:.* )?validation(-.*)?")
MOST_LINES = 36  # of a figure: six colours with six kinds of dashes


def run_figures(run: RunFiles, length: int | None) -> list[dict[str, Any]]:
    """Return the figures that the run has values for.

    Args:
        run: the run's files.
        length: tokens of a sequence, if known.
    """
    found = [
        _losses(run),
        _of_tags(run, "Tokens selected", PERCENT, {"selected ratio": 1}, span=WHOLE, times=100),
        _of_tags(
            run,
            "Excess over the reference and the threshold of selection",
            NATS,
            {"threshold": 3, "excess loss": 0},
        ),
        *_by_domain(run),
        _throughput(run, length),
        _of_tags(
            run,
            "Time that the reference takes",
            "% of a step's time",
            {"reference time share": 3},
            span=WHOLE,
            times=100,
        ),
    ]
    return [each for each in found if each["lines"]]


def _losses(run: RunFiles) -> dict[str, Any]:
    """Return the figure of the losses of training and validation; a run that does not select has
    one of training."""
    training = LOSSES if "all-token loss" in run.scalars else {"lm loss": 0}
    tags, most = validation_tags(run), MOST_LINES - len(training)
    notes = [_selected_below(run)]
    if len(tags) > most:
        notes.append(f"The first {most} of {len(tags):,} validation losses by name.")
    roles = training | {tag: role for role, tag in enumerate(tags[:most], 4)}
    return _of_tags(run, "Loss", NATS, roles, note=" ".join(filter(None, notes)))


def _selected_below(run: RunFiles) -> str:
    """Explain why the selected tokens have the lower loss, if they do in the second half of the
    run; otherwise return nothing."""
    selected, others = (run.scalars.get(f"{which} loss") for which in ("selected", "unselected"))
    if selected is None or others is None or score_of(run) != "excess":
        return ""
    ends = [statistics.mean(each.values[len(each.values) // 2 :]) for each in (selected, others)]
    if ends[0] >= ends[1]:
        return ""
    return (
        "The selected tokens have the lower loss, and that is intended: what counts is how far a "
        "token's loss is above the reference's. Tokens that the reference finds hard as well "
        "(noise, names, numbers) are left out however high their loss."
    )


def _of_tags(
    run: RunFiles,
    title: str,
    y: str,
    roles: dict[str, int],
    *,
    times: int = 1,
    **options: Any,
) -> dict[str, Any]:
    lines = [
        curve(spelt_out(tag), series.iterations, [times * value for value in series.values], role)
        for tag, role in roles.items()
        if (series := run.scalars.get(tag))
    ]
    return figure(title, "iteration", y, lines, **options)


def _by_domain(run: RunFiles) -> list[dict[str, Any]]:
    names = sorted(
        tag.removeprefix(SELECTED_RATIO)
        for tag in run.scalars
        if tag.startswith(SELECTED_RATIO)
        and not tag.endswith(" ppl")
        and not OF_VALIDATION.fullmatch(tag.removeprefix(SELECTED_RATIO))
    )
    note = ""
    if len(names) > MOST_LINES:
        note = f"The first {MOST_LINES} of {len(names):,} datasets by name."
    figures = []
    for title, what, y, times in (
        ("Selected part of each dataset", "selected ratio", "% of its tokens", 100),
        ("Loss of the selected tokens of each dataset", "selected loss", NATS, 1),
        ("Loss of the tokens left out of each dataset", "unselected loss", NATS, 1),
    ):
        lines = [
            curve(name, series.iterations, [times * value for value in series.values], role)
            for role, name in enumerate(names[:MOST_LINES])
            if (series := run.scalars.get(f"{what} {name}"))
        ]
        figures.append(figure(title, "iteration", y, lines, note=note))
    return figures


def _throughput(run: RunFiles, length: int | None) -> dict[str, Any]:
    """Return the figure of tokens a second; an empty one if the length of a sequence is not known,
    so that all runs of a page have the same unit."""
    title, unit = "Throughput", "tokens a second"
    times, batches = (run.scalars.get(tag) for tag in ("iteration-time", "batch-size"))
    if times is None or batches is None or length is None:
        return figure(title, "iteration", unit, [])
    sizes = dict(zip(batches.iterations, batches.values, strict=True))
    rates = {
        at: sizes[at] * length / seconds
        for at, seconds in zip(times.iterations, times.values, strict=True)
        if at in sizes and seconds > 0
    }
    lines = [curve(unit, list(rates), list(rates.values()), 2)] if rates else []
    return figure(title, "iteration", unit, lines, span=(0.0, None))
