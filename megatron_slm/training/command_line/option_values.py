"""The values that options accept: numbers within bounds, and pairs such as NAME=0.5.

Each of them serves argparse as a `type`: it converts the text of the command line, or raises an
ArgumentTypeError that says what to write instead.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Number:
    """A number within bounds."""

    kind: type[int] | type[float]
    """The type that the text is converted to."""
    accepted: str
    """The numbers within the bounds, in words, for the documentation."""
    holds: Callable[[float], bool]
    """Tells whether a number is within the bounds."""
    refusal: str
    """What to say of any other number, which stands for {}."""

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a number") from None
        if not self.holds(value):
            raise ArgumentTypeError(self.refusal.format(text))
        return value


_ratio = Number(
    float,
    "number in (0, 1]",
    lambda value: 0.0 < value <= 1.0,
    "must be in (0, 1], not {}; 0.6 is 60% of the tokens",
)
Ratio = Annotated[float, _ratio]
Weight = Annotated[
    float,
    Number(
        float,
        "number, 0 or more",
        lambda value: 0.0 <= value < math.inf,
        "must be finite and not negative, not {}",
    ),
]
Temperature = Annotated[
    float,
    Number(
        float,
        "number above 0",
        lambda value: 0.0 < value < math.inf,
        "must be finite and above 0, not {}",
    ),
]
Count = Annotated[
    int, Number(int, "integer, 1 or more", lambda value: value >= 1, "must be at least 1, not {}")
]
Natural = Annotated[
    int,
    Number(int, "integer, 0 or more", lambda value: value >= 0, "must not be negative, as {} is"),
]


@dataclass(frozen=True)
class Named:
    """A function of tokens: one that is built in, or a user's own."""

    names: tuple[str, ...]
    """Those that are built in."""

    def __call__(self, text: str) -> str:
        module, colon, function = text.partition(":")
        own = colon and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
        if text not in self.names and not own:
            raise ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(self.names)}, or name your own "
                "as module:function)"
            )
        return text


def score_option(text: str) -> str:
    """Check the option of a score or a weighting, NAME=VALUE, and return it as it is."""
    name, equals, _ = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ArgumentTypeError(f"{text}: give NAME=VALUE, as in gamma=2")
    return text


def left_out(text: str) -> str:
    """Check a way to leave tokens out, above=X, below=X or goldfish=K:H, and return it as it is."""
    how, _, value = text.partition("=")
    if how == "goldfish":
        one_in, _, width = value.partition(":")
        if not all(part.isascii() and part.isdigit() for part in (one_in, width)):
            raise ArgumentTypeError(f"{text}: give goldfish=K:H, as in goldfish=50:50")
        if int(one_in) < 2 or int(width) < 1:
            raise ArgumentTypeError(f"{text}: K must be at least 2, and H at least 1")
        return text
    if how not in ("above", "below"):
        raise ArgumentTypeError(f"{text}: give above=X, below=X or goldfish=K:H")
    try:
        finite = math.isfinite(float(value))
    except ValueError:
        finite = False
    if not finite:
        raise ArgumentTypeError(f"{text}: {value!r} is not a number")
    return text


def ratio_step(text: str) -> str:
    """Check a step of a ratio schedule, N:K, and return it as it is."""
    iteration, _, part = text.partition(":")
    if not (iteration.isascii() and iteration.isdigit()):
        raise ArgumentTypeError(f"{text}: give iteration:ratio, as in 1000:0.7")
    _ratio(part)
    return text


def domain_ratio(text: str) -> str:
    """Check a dataset's ratio, NAME=K, and return it as it is."""
    name, _, part = text.rpartition("=")
    if not name:
        raise ArgumentTypeError(f"{text}: give NAME=RATIO, as in web=0.5")
    _ratio(part)
    return text
