"""Draw a study's figures as SVG files that stand alone, for pages that run no script.

A picture is 840 wide, about as wide as a README is shown, so its text keeps its size there.  It has
the report page's colours, in light and in dark mode, and no font of its own.  The same results give
the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from statistics import median
from typing import Any

from megatron_slm.analysis.experiments.table import spread
from megatron_slm.analysis.report.figures import thin
from megatron_slm.analysis.report.study import read_study
from megatron_slm.analysis.report.study_figures import (
    Difference,
    arm_differences,
    compute_figure,
    study_figure,
    with_arms,
)
from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

WIDTH, MARGIN = 840, 24
TITLE_Y, NOTE_Y, FIRST_Y, LINE = 36, 60, 110, 24  # of text
LEFT, CHART_HEIGHT = 66, 300  # of a chart of curves
BAR_LEFT, BAR_RIGHT, BAR = 370, 680, 16  # of one of bars, beside which their values stand
X_TICKS, Y_TICKS = 7, 6  # at most
MOST_POINTS = 100  # of a curve
ROLES = 6  # colours of the page
LONGEST = 3.0  # a bar's, in median bars; longer ones are cut
ARROW = 9
DASH = 0.015  # for a single point: half its length, as a part of the axis
NOTE_LETTERS, LEGEND_LETTERS, BAR_LETTERS = 120, 72, 50  # that fit
NAME_LETTERS, LETTER = (12, 24), 10  # of arms' names in a legend: least and most; width of a letter
SETS = 4  # in a row of a legend
STYLE = """
text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
text { fill: var(--ink) } .title { font-size: 18px; font-weight: 600 } .name { font-weight: 600 }
.soft { fill: var(--soft); font-size: 13px }
.end { text-anchor: end } .middle { text-anchor: middle }
.paper { fill: var(--paper) } .grid { stroke: var(--rule) }
.axis, .spread { stroke: var(--ink); stroke-width: 1.3 }
.line { fill: none; stroke: currentColor; stroke-width: 2.4; stroke-linejoin: round }
.band { fill: currentColor; opacity: .2 } .bar { fill: currentColor; opacity: .85 }
"""


@dataclass(frozen=True)
class Scale:
    """Places values between two ends of an axis."""

    low: float
    """The value at `start`."""

    high: float
    """The value at `end`."""

    start: float
    """Where the axis begins, in the picture's units."""

    end: float
    """Where it ends."""

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return at most about so many round values on the axis."""
        least = (self.high - self.low) / most
        power: float = 10.0 ** floor(log10(least))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= least)
        return [step * at for at in range(ceil(self.low / step), floor(self.high / step) + 1)]


def write_picture(directory: Path, kind: str, arms: Sequence[str], output: Path) -> None:
    """Draw a figure of a study.

    Args:
        directory: the study's directory, with results.json.
        kind: one of PICTURES.
        arms: names of the arms to show; none stands for all of them.
        output: the SVG file to write.

    Raises:
        UserError: the directory has no results, or these lack what the figure shows.
    """
    results = with_arms(read_study(directory), arms)
    write_whole(output, "\n".join([*PICTURES[kind](results), ""]).encode())


def _curves(figure: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """Draw a figure of figures.py, below a legend with each arm's final loss."""
    longest = max(place for line in figure["lines"] for place in line["x"])
    longest = longest if longest > 0 else 1.0
    lines = [_drawn(line, DASH * longest) for line in figure["lines"]]
    top = FIRST_Y + LINE * len(lines) + 8
    bottom, right = top + CHART_HEIGHT, WIDTH - MARGIN
    losses = [loss for line in lines for key in ("y", "low", "high") for loss in line.get(key, ())]
    low, high = min(losses), max(losses)
    if figure["top"] is not None:
        high = min(high, figure["top"])
    room = 0.04 * (high - low) or 1.0
    y = Scale(low - room, high + room, bottom, top)
    x = Scale(0.0, longest, LEFT, right)
    tokens = results["summary"]["compared"]["tokens"]
    note = f"The numbers are losses after {tokens:,} tokens. {figure['note']}"
    if figure["top"] is not None:
        note += " Higher losses are cut off."
    yield from _head(figure["title"], (_about(results), note), bottom + 52)
    letters = min(NAME_LETTERS[1], max(NAME_LETTERS[0], *(len(line["name"]) for line in lines)))
    for number, line in enumerate(lines):
        yield from _legend(FIRST_Y + LINE * number, line, results, letters)
    for loss in y.ticks(Y_TICKS):
        yield f'<path d="M{LEFT} {y(loss):.1f}H{right}" class="grid"/>'
        yield _text(LEFT - 8, y(loss) + 5, _short(loss), "soft end")
    for place in x.ticks(X_TICKS):
        yield _text(x(place), bottom + 20, _short(place), "soft middle")
    yield _text(LEFT, top - 6, figure["y"], "soft")
    yield _text(right, bottom + 40, figure["x"], "soft end")
    yield f'<path d="M{LEFT} {bottom}H{right}" class="axis"/>'
    box = f'x="{LEFT}" y="{top}" width="{right - LEFT}" height="{CHART_HEIGHT}"'
    yield f'<clipPath id="chart"><rect {box}/></clipPath>'
    yield '<g clip-path="url(#chart)">'
    for line in lines:
        if "low" in line:
            edge = _path(x, y, line["x"], line["high"])
            back = _path(x, y, line["x"][::-1], line["low"][::-1])
            yield f'<path d="M{edge}L{back}Z" class="band role-{line["role"] % ROLES}"/>'
    for line in lines:
        yield _stroke(_path(x, y, line["x"], line["y"]), line)
    yield "</g>"
    yield "</svg>"


def _drawn(line: dict[str, Any], aside: float) -> dict[str, Any]:
    """Return a line with as many points as are drawn; a single one, which would not be seen,
    becomes a dash that reaches so far to either side."""
    there = [key for key in ("x", "y", "low", "high") if key in line]
    drawn = line | {key: thin(line[key], MOST_POINTS) for key in there}
    if len(line["x"]) == 1:
        drawn |= {key: drawn[key] * 2 for key in there}
        drawn["x"] = [line["x"][0] - aside, line["x"][0] + aside]
    return drawn


def _path(x: Scale, y: Scale, places: Sequence[float], losses: Sequence[float]) -> str:
    points = zip(places, losses, strict=True)
    return "L".join(f"{x(place):.1f} {y(loss):.1f}" for place, loss in points)


def _stroke(path: str, line: dict[str, Any]) -> str:
    dash = f' stroke-dasharray="{line["dash"]}"' if line["dash"] else ""
    return f'<path d="M{path}" class="line role-{line["role"] % ROLES}"{dash}/>'


def _legend(y: float, line: dict[str, Any], results: dict[str, Any], letters: int) -> Iterator[str]:
    """Draw an arm's line, name of at most so many letters, final loss and description."""
    arm, loss = line["name"], MARGIN + 44 + LETTER * letters
    yield _stroke(f"{MARGIN} {y - 5}h34", line)
    yield _text(MARGIN + 44, y, _clipped(arm, letters), "name")
    yield _text(loss, y, spread(results["summary"]["arms"][arm]["final_loss"]))
    description = results["arms"][arm]["description"]
    fit = LEGEND_LETTERS - (letters - NAME_LETTERS[0]) * 3 // 2
    yield _text(loss + 142, y, _clipped(description, fit), "soft")


def _bars(results: dict[str, Any]) -> Iterator[str]:
    """Draw each arm's difference from the baseline, as a bar for each validation set."""
    found = arm_differences(results)
    if not found:
        raise UserError("results.json has no arm besides the baseline with seeds of its own")
    sets = list(dict.fromkeys(one.validation_set for one in found))
    arms = list(dict.fromkeys(one.arm for one in found))
    row = max(LINE * len(sets), 2 * LINE - 4) + 8
    top = FIRST_Y - 4 + (LINE * ceil(len(sets) / SETS) if len(sets) > 1 else 0)
    bottom = top + row * len(arms)
    longest = LONGEST * median(abs(one.mean) for one in found)
    ends = [0.0, *(max(-longest, min(longest, end)) for one in found for end in _ends(one))]
    room = 0.04 * (max(ends) - min(ends)) or 1.0
    x = Scale(min(ends) - room, max(ends) + room, BAR_LEFT, BAR_RIGHT)
    baseline = results["summary"]["baseline"]
    note = f"Below zero is better than {baseline}"
    if any(one.std is not None for one in found):
        note += "; thin lines are standard deviations over seeds"
    if any(_is_beyond(one, x) for one in found):
        note += "; bars with a point are longer than shown"
    title = f"Loss minus {baseline}'s, nats a token"
    yield from _head(title, (_about(results), f"{note}."), bottom + 34)
    for number, name in enumerate(sets if len(sets) > 1 else ()):
        at, y = MARGIN + 180 * (number % SETS), FIRST_Y + LINE * (number // SETS)
        role = number % ROLES
        yield f'<rect x="{at}" y="{y - 12}" width="26" height="12" class="bar role-{role}"/>'
        yield _text(at + 34, y - 1, _clipped(name or "target", 18))
    for value in x.ticks(Y_TICKS):
        yield f'<path d="M{x(value):.1f} {top}V{bottom}" class="grid"/>'
        yield _text(x(value), bottom + 20, _short(value), "soft middle")
    for number, arm in enumerate(arms):
        own = [one for one in found if one.arm == arm]
        at = top + row * number + 4
        yield _text(MARGIN, at + 15, _clipped(arm, 30), "name")
        yield _text(MARGIN, at + 33, _clipped(own[0].description, BAR_LETTERS), "soft")
        for one in own:
            place = sets.index(one.validation_set)
            yield from _bar(one, x, at + LINE * place + 2, place % ROLES)
    yield f'<path d="M{x(0.0):.1f} {top}V{bottom}" class="axis"/>'
    yield "</svg>"


def _is_beyond(one: Difference, x: Scale) -> bool:
    return not x.low <= one.mean <= x.high


def _ends(one: Difference) -> tuple[float, float]:
    return one.mean - (one.std or 0.0), one.mean + (one.std or 0.0)


def _bar(one: Difference, x: Scale, y: float, role: int) -> Iterator[str]:
    """Draw a difference from zero on, pointed if it ends outside, with its spread and value."""
    middle, zero = y + BAR / 2, x(0.0)
    end = x(max(x.low, min(x.high, one.mean)))
    point = 0 if not _is_beyond(one, x) else ARROW if one.mean > 0 else -ARROW
    sides = f"H{end - point:.1f}L{end:.1f} {middle}L{end - point:.1f} {y + BAR}H{zero:.1f}"
    yield f'<path d="M{zero:.1f} {y}{sides}Z" class="bar role-{role}"/>'
    if one.std is not None and not point:
        low, high = (x(max(x.low, min(x.high, value))) for value in _ends(one))
        yield f'<path d="M{low:.1f} {middle}H{high:.1f}" class="spread"/>'
    value = f"{one.mean:+.3f}" + ("" if one.std is None else f" ± {one.std:.3f}")
    yield _text(WIDTH - MARGIN, y + BAR - 3, value, "end")


def _head(title: str, notes: Sequence[str], height: float) -> Iterator[str]:
    """Open the picture, with a title and lines below it."""
    colours = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").partition("\n*")[0]
    roles = "\n".join(f".role-{role} {{ color: var(--role-{role}) }}" for role in range(ROLES))
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}">'
    yield f"<style>\n{colours}{STYLE}{roles}\n</style>"
    yield f'<rect width="{WIDTH}" height="{height:.0f}" rx="8" class="paper"/>'
    yield _text(MARGIN, TITLE_Y, title, "title")
    for number, note in enumerate(notes):
        yield _text(MARGIN, NOTE_Y + 20 * number, _clipped(note, NOTE_LETTERS), "soft")


def _about(results: dict[str, Any]) -> str:
    """Say what the losses are of."""
    target = results["target"]
    return f"Target: {target}." if target else f"Study {results['study']}."


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    shown = escape("".join(letter for letter in words if letter.isprintable()))
    return f'<text x="{x:.1f}" y="{y:.1f}"{f' class="{kind}"' if kind else ""}>{shown}</text>'


def _clipped(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1].rstrip() + "…"


def _short(value: float) -> str:
    """Write a value on an axis: 1500000 as 1.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.6g}{letter}"
    return f"{value:.6g}"


PICTURES = {
    "tokens": lambda results: _curves(study_figure(results), results),
    "compute": lambda results: _curves(compute_figure(results), results),
    "arms": _bars,
}
