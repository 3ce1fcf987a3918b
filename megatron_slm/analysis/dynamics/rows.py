"""Turn token dynamics into rows of text: shares, transitions, learning times and examples.

The terminal (write_dynamics.py) and the report page (report/dynamics_section.py) both show them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.dynamics.learning_times import LearningTimes
from megatron_slm.analysis.dynamics.token_dynamics import CLASSES, TokenDynamics
from megatron_slm.analysis.dynamics.token_kinds import TOKEN_KINDS, token_kinds

EXAMPLES, CONTEXT = 4, 12  # examples of each class; tokens shown before and after each
MOST_DOMAINS = 12
EXPLAINED = {
    "H->H": "stays high",
    "H->L": "falls",
    "L->H": "rises",
    "L->L": "stays low",
}


def class_rows(dynamics: TokenDynamics) -> list[list[str]]:
    """Return a header and a row per class: its share of the tokens, and its mean loss in nats at
    the first and the last checkpoint."""
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    rows = [["class", "share", f"mean loss at {first:,}", f"at {last:,}"]]
    for name in CLASSES:
        curve, share = dynamics.mean_curve(name), dynamics.share(name)
        losses = [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"] if share else ["", ""]
        rows.append([class_title(name), f"{share:.1%}", *losses])
    return rows


def transition_rows(dynamics: TokenDynamics) -> list[list[str]]:
    """Return a header and two rows: for tokens that start high and for those that start low, what
    part of them ends high and what part ends low."""
    rows = [["", "share", "to high", "to low"]]
    for name, start in (("high", "H"), ("low", "L")):
        ends = [dynamics.share(f"{start}->{end}") for end in "HL"]
        parts = [f"{end / sum(ends):.1%}" if sum(ends) else "" for end in ends]
        rows.append([f"from {name}", f"{sum(ends):.1%}", *parts])
    return rows


def by_domain(dynamics: TokenDynamics) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens are from each of the largest domains, [T], by the domain's name; nothing
    if domains are not known."""
    if dynamics.domains is None:
        return {}
    names, counts = np.unique(dynamics.domains, return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")[:MOST_DOMAINS]]
    return {str(name): dynamics.domains == name for name in largest}


def by_kind(dynamics: TokenDynamics, texts: list[str]) -> dict[str, NDArray[np.bool_]]:
    """Return which tokens are of each kind that occurs (token_kinds.py), [T], by its name."""
    kinds = token_kinds(dynamics, texts)
    return {name: own for at, name in enumerate(TOKEN_KINDS) if (own := kinds == at).any()}


def learning_rows(found: LearningTimes, groups: dict[str, NDArray[np.bool_]]) -> list[list[str]]:
    """Return a header and a row per group of tokens: how many are learned, and when.

    Args:
        found: when each of T tokens was learned.
        groups: [T], which tokens are in each group, by its name.
    """
    rows = [["tokens", "count", "learned", "half of these by", "half of a fall within"]]
    for name, own in groups.items():
        times, widths = (each[own & found.learned] for each in (found.times, found.widths))
        when = ["", ""]
        if len(times):
            when = [f"{np.median(times):,.0f}", f"a factor of {9 ** np.median(widths):.2g}"]
        rows.append([name, f"{own.sum():,}", f"{found.learned[own].mean():.1%}", *when])
    return rows


def class_title(name: str) -> str:
    """Return a class's name followed by its meaning, such as "H→L falls"."""
    return f"{_arrow(name)} {EXPLAINED[name]}"


def _arrow(name: str) -> str:
    return name.replace("->", "\u2192")


def in_context(dynamics: TokenDynamics, texts: list[str], at: int) -> tuple[str, str, str, str]:
    """Return the text before a token, its own, the text after it, and how its loss changed.

    Args:
        texts: [T], the text of each token.
        at: index of the token; only tokens of the same sample are shown around it, and of the same
            document where documents do not see each other.
    """
    own = dynamics.samples == dynamics.samples[at]
    if dynamics.documents is not None:
        own &= dynamics.documents == dynamics.documents[at]
    before = [n for n in range(max(0, at - CONTEXT), at) if own[n]]
    after = [n for n in range(at + 1, min(len(texts), at + 1 + CONTEXT)) if own[n]]
    start, end = dynamics.losses[0, at], dynamics.losses[-1, at]
    join = ("".join(texts[n] for n in part) for part in (before, [at], after))
    left, token, right = (part.replace("\n", "") for part in join)
    return left, token, right, f"{start:.2f} \u2192 {end:.2f} nats"
