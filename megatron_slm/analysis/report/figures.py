"""Figures as chart.js draws them: lines over iterations or tokens, each with a role instead of a
colour, since a page has its own colours in the light, in the dark and on paper.

A line differs from its neighbours in its dashes as well, so that nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 600  # of a line: more than a page has pixels for
PAGE_POINTS = 20_000  # of all lines of a page, which is to stay small
LEAST_POINTS = 20
DASHES = ("", "8 4", "2 3", "8 3 2 3", "14 4", "14 3 2 3")
DIGITS = 6  # significant: more than a page shows

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
    """Return a line; of more points than are seen, means of neighbours.

    Args:
        role: which of the page's colours, from 0.
        spread: the lowest and the highest values, between which a band is drawn.
        points: mark each.
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
) -> dict[str, Any]:
    """Return a figure with named axes.

    Args:
        note: a sentence below the title that says how to read it.
        span: ends of the vertical axis, for quantities that have natural ones.
        top: where the vertical axis is cut at first; the page offers to show all.
    """
    for number, each in enumerate(lines):
        turn = number // len(DASHES)  # when the colours begin anew
        each["dash"] = DASHES[(number + turn) % len(DASHES)]
    return {"title": title, "x": x, "y": y, "lines": lines, "note": note, "span": span, "top": top}


def fit(figures: list[dict[str, Any]]) -> None:
    """Make the lines of a page's figures coarser where they have too many points together."""
    lines = [each for figure in figures for each in figure["lines"]]
    if (total := sum(len(each["x"]) for each in lines)) <= PAGE_POINTS:
        return
    most = max(LEAST_POINTS, MOST_POINTS * PAGE_POINTS // total)
    for each in lines:
        each |= {key: thin(each[key], most) for key in ("x", "y", "low", "high") if key in each}


def thin(values: Sequence[float | None], most: int = MOST_POINTS) -> list[float | None]:
    """Return means of equal numbers of neighbours, `most` of them; the values if they are few.
    None stands for what is no number, which JSON does not know."""
    array = np.asarray(values, np.float64)
    if len(array) > most:
        array = np.array([part.mean() for part in np.array_split(array, most)])
    return [_rounded(value) if math.isfinite(value) else None for value in array.tolist()]


def _rounded(value: float) -> float:
    if value.is_integer():
        return int(value)
    return float(f"{value:.{DIGITS}g}")
