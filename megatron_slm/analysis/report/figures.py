"""Figures as plotly.js takes them, without colours: page.js gives each line that of its role, for
light and dark pages and for print.

A line differs from its neighbours in its dashes as well, so that nothing depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 600  # of a line: more than a page has pixels for
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

Numbers = Sequence[float]


def line(name: str, x: Numbers, y: Numbers, role: int, **more: Any) -> dict[str, Any]:
    """A line; of more points than are seen, means of neighbours.

    Args:
        role: which of the page's colours, from 0.
    """
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": thin(x),
        "y": thin(y),
        "meta": {"role": role},
        "line": {"width": 2},
        "hovertemplate": "%{y:.4~f}",
    } | more


def band(x: Numbers, low: Numbers, high: Numbers, role: int) -> dict[str, Any]:
    """The area between two lines, without an entry in the legend."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*thin(x), *thin(x)[::-1]],
        "y": [*thin(high), *thin(low)[::-1]],
        "fill": "toself",
        "line": {"width": 0},
        "meta": {"role": role, "band": True},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def figure(
    title: str, x: str, y: str, data: list[dict[str, Any]], **layout: dict[str, Any]
) -> dict[str, Any]:
    """A figure with named axes."""
    lines = [trace for trace in data if not trace["meta"].get("band")]
    for number, trace in enumerate(lines):
        turn = number // len(DASHES)  # when the colours begin anew
        trace["line"] = trace["line"] | {"dash": DASHES[(number + turn) % len(DASHES)]}
    return {
        "title": title,
        "data": data,
        "layout": {
            axis: {"title": {"text": name}} | layout.get(axis, {})
            for axis, name in (("xaxis", x), ("yaxis", y))
        },
    }


def thin(values: Numbers) -> list[float | None]:
    """Means of equal numbers of neighbours, at most MOST_POINTS; the values if they are few.  None
    for what is no number, which JSON does not know."""
    array = np.asarray(values, np.float64)
    if len(array) > MOST_POINTS:
        array = np.array([part.mean() for part in np.array_split(array, MOST_POINTS)])
    return [value if math.isfinite(value) else None for value in array.tolist()]
