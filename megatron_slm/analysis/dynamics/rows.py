"""Say of token dynamics what people read: shares, transitions and examples, row by row."""

from __future__ import annotations

from megatron_slm.analysis.dynamics.token_dynamics import CLASSES, TokenDynamics

EXAMPLES, CONTEXT = 4, 12  # of each class; tokens before and after
EXPLAINED = {
    "H->H": "stays high",
    "H->L": "falls",
    "L->H": "rises",
    "L->L": "stays low",
}


def class_rows(dynamics: TokenDynamics) -> list[list[str]]:
    """Head and rows: share of each class, its mean losses at both ends."""
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    rows = [["class", "share", f"mean loss at {first:,}", f"at {last:,}"]]
    for name in CLASSES:
        curve, share = dynamics.mean_curve(name), dynamics.share(name)
        losses = [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"] if share else ["", ""]
        rows.append([class_title(name), f"{share:.1%}", *losses])
    return rows


def transition_rows(dynamics: TokenDynamics) -> list[list[str]]:
    """Head and rows: of the tokens that were high, or low, what part was so at the end."""
    rows = [["", "share", "to high", "to low"]]
    for name, start in (("high", "H"), ("low", "L")):
        ends = [dynamics.share(f"{start}->{end}") for end in "HL"]
        parts = [f"{end / sum(ends):.1%}" if sum(ends) else "" for end in ends]
        rows.append([f"from {name}", f"{sum(ends):.1%}", *parts])
    return rows


def class_title(name: str) -> str:
    """Return a class with its meaning, as "H→L falls"."""
    return f"{_arrow(name)} {EXPLAINED[name]}"


def _arrow(name: str) -> str:
    return name.replace("->", "\u2192")


def in_context(dynamics: TokenDynamics, texts: list[str], at: int) -> tuple[str, str, str, str]:
    """Text before, of and after a token of the same sample, and what became of its loss."""
    own = dynamics.samples == dynamics.samples[at]
    before = [n for n in range(max(0, at - CONTEXT), at) if own[n]]
    after = [n for n in range(at + 1, min(len(texts), at + 1 + CONTEXT)) if own[n]]
    start, end = dynamics.losses[0, at], dynamics.losses[-1, at]
    join = ("".join(texts[n] for n in part) for part in (before, [at], after))
    left, token, right = (part.replace("\n", "") for part in join)
    return left, token, right, f"{start:.2f} \u2192 {end:.2f} nats"
