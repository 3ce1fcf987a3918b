"""Describe figures for chart.js to draw: lines over iterations or tokens.

A line has a role instead of a colour, since the page's colours differ in light mode, in dark mode
and on paper.  Neighbouring lines also differ in their dashes, so nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 600  # of a line; a figure has no pixels for more
PAGE_POINTS = 20_000  # of all lines of a page, to keep its file small
LEAST_POINTS = 20
DASHES = ("", "8 4", "2 3", "8 3 2 3", "14 4", "14 3 2 3")
DIGITS = 6  # significant digits, more than a page shows

Numbers = Sequence[float]


def curve(
    name: str,
    x: Numbers,
    y: Numbers,
    role: int,
    *,
    spread: tuple[Numbers, Numbers] | None = None,
    points: bool = False,
) -> dict[str, Any]:
    """Return a line; if it has more points than can be seen, neighbours are averaged.

    Args:
        name: the line's name in the legend.
        x: positions of the points.
        y: their values, as many.
        role: index of the page's colour for the line, from 0.
        spread: the lowest and the highest values, between which a band is drawn.
        points: whether to mark each point.
    """
    made: dict[str, Any] = {"name": name, "x": thin(x), "y": thin(y), "role": role}
    if spread is not None:
        made["low"], made["high"] = map(thin, spread)
    if points:
        made["points"] = True
    return made


def figure(
    title: str,
    x: str,
    y: str,
    lines: list[dict[str, Any]],
    *,
    note: str = "",
    span: tuple[float, float | None] | None = None,
    top: float | None = None,
    powers: bool = False,
) -> dict[str, Any]:
    """Return a figure with named axes.

    Args:
        title: the figure's title.
        x: name of the horizontal axis.
        y: name and unit of the vertical axis.
        lines: what `curve` returned for each line.
        note: a sentence below the title that says how to read the figure.
        span: limits of the vertical axis, for quantities that have natural ones.
        top: value at which the vertical axis is cut off at first; the page offers to show the rest.
        powers: whether horizontal positions are decimal logarithms, to be shown as powers of ten.
    """
    for number, each in enumerate(lines):
        turn = number // len(DASHES)  # shifts the dashes when the colours repeat
        each["dash"] = DASHES[(number + turn) % len(DASHES)]
    made = {"title": title, "x": x, "y": y, "lines": lines, "note": note, "span": span, "top": top}
    return made | {"powers": powers}


def fit(figures: list[dict[str, Any]]) -> None:
    """Thin out the lines of a page's figures, in place, if they have too many points together."""
    lines = [each for figure in figures for each in figure["lines"]]
    if (total := sum(len(each["x"]) for each in lines)) <= PAGE_POINTS:
        return
    most = max(LEAST_POINTS, MOST_POINTS * PAGE_POINTS // total)
    for each in lines:
        each |= {key: thin(each[key], most) for key in ("x", "y", "low", "high") if key in each}


def thin(values: Sequence[float | None], most: int = MOST_POINTS) -> list[float | None]:
    """Average equal numbers of neighbours to leave `most` values; return fewer values as they are.

    None stands for NaN and infinity, which JSON does not have.
    """
    array = np.asarray(values, np.float64)
    if len(array) > most:
        array = np.array([part.mean() for part in np.array_split(array, most)])
    return [_rounded(value) if math.isfinite(value) else None for value in array.tolist()]


def _rounded(value: float) -> float:
    if value.is_integer():
        return int(value)
    return float(f"{value:.{DIGITS}g}")
