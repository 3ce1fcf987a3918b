"""Read back what a picture of a study shows, from its marks and the numbers on its axes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

SPACE = "{http://www.w3.org/2000/svg}"
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


class Picture(NamedTuple):
    """A picture, and the points of its curves in the units of its axes."""

    root: ElementTree.Element
    lines: list[NDArray[np.float64]]
    bands: list[NDArray[np.float64]]
    texts: list[str]


def read_picture(path: Path) -> Picture:
    """Parse a picture with curves."""
    root = ElementTree.parse(path).getroot()
    chart = root.find(f"{SPACE}g")
    assert chart is not None
    x, y = axis(root, "soft middle", "x"), axis(root, "soft end", "y")
    lines = [points(path, x, y) for path in chart if path.attrib["class"].startswith("line")]
    bands = [points(path, x, y) for path in chart if path.attrib["class"].startswith("band")]
    return Picture(root, lines, bands, texts(root))


def texts(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SPACE}text")]


def number(text: str | None) -> float | None:
    found = re.fullmatch(r"(-?[\d.]+)([kMG]?)", text or "")
    return None if found is None else float(found[1]) * UNITS.get(found[2], 1.0)


def axis(root: ElementTree.Element, kind: str, place: str) -> tuple[float, float]:
    """Return slope and offset of values over places, from the numbers on an axis."""
    marks = [
        (float(each.attrib[place]), value)
        for each in root.iter(f"{SPACE}text")
        if each.attrib.get("class") == kind and (value := number(each.text)) is not None
    ]
    assert len(marks) > 1
    slope, offset = np.polyfit(*zip(*marks, strict=True), 1)
    if place == "y":  # the baseline of a number is below its line on the chart
        offset += slope * 5
    return float(slope), float(offset)


def points(
    path: ElementTree.Element, x: tuple[float, float], y: tuple[float, float]
) -> NDArray[np.float64]:
    """Return a path's points [n, 2] in the units of the axes."""
    places = np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attrib["d"]), float)
    return places * (x[0], y[0]) + (x[1], y[1])
