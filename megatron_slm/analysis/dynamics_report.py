"""From token dumps to what is read of token dynamics: files, a table, a section of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.dynamics_files import check_libraries, plot, read_table, write_table
from megatron_slm.analysis.report.figures import figure, line
from megatron_slm.analysis.token_dynamics import CLASSES, TokenDynamics, classify
from megatron_slm.analysis.token_text import dump_tokenizer, token_texts
from megatron_slm.data.token_dump import read_dumps

EXAMPLES, CONTEXT = 4, 12  # of each class; tokens before and after
EXPLAINED = {
    "H->H": "stays high",
    "H->L": "falls",
    "L->H": "rises",
    "L->L": "stays low",
}
ROLES = {"H->H": 1, "H->L": 0, "L->H": 3, "L->L": 2}


def write_dynamics(
    dumps: Path, directory: Path, tokenizer_model: str | None, iterations: list[int] | None = None
) -> None:
    """Classify the tokens of a directory of dumps; write the table and the plots, print the shares,
    transitions and examples.

    Args:
        iterations: of the dumps to take; None for all.

    Raises:
        UserError: as read_dumps and classify; no such tokenizer.
    """
    check_libraries()
    read = read_dumps(dumps, iterations)
    dynamics = classify(read)
    unique, numbers = np.unique(dynamics.tokens, return_inverse=True)
    shown = token_texts(dump_tokenizer(read, tokenizer_model), unique.tolist())
    texts = [shown[number] for number in numbers.tolist()]
    table = write_table(directory, dynamics, texts)
    print(f"{len(texts):,} tokens at {len(dynamics.iterations)} iterations")
    for head, *rows in (_classes(dynamics), _transitions(dynamics)):
        print()
        for first, *others in [head, *rows]:
            print(f"{first:20}" + "".join(f"{value:>20}" for value in others))
    for name in CLASSES:
        print(f"\n{_title(name)}")
        for at in dynamics.examples(name, EXAMPLES):
            before, token, after, note = _in_context(dynamics, texts, at)
            print(f"  {before}[{token}]{after}   {note}")
    print()
    for path in [table, *plot(directory, dynamics)]:
        print(f"> {path}")


def dynamics_section(table: Path) -> dict[str, Any]:
    """What the page shows of a table: shares, transitions, curves, examples."""
    dynamics, texts = read_table(table)
    curves = [
        line(
            f"{_title(name)} ({dynamics.share(name):.0%})",
            dynamics.iterations,
            dynamics.mean_curve(name).tolist(),
            ROLES[name],
            points=True,
        )
        for name in CLASSES
        if dynamics.share(name) > 0
    ]
    return {
        "lead": f"{len(texts):,} tokens at {len(dynamics.iterations)} iterations. A token "
        "is H\u2192L or L\u2192H if the line fitted to its losses falls or rises by more than 0.2 "
        "nats, else L\u2192L or H\u2192H by whether its last loss is above the mean.",
        "tables": [
            {"title": title, "head": head, "rows": rows}
            for title, (head, *rows) in (
                ("Classes", _classes(dynamics)),
                ("Transitions", _transitions(dynamics)),
            )
        ],
        "figures": [figure("Mean loss of each class", "iteration", "nats a token", curves)],
        "examples": [
            {
                "title": _title(name),
                "tokens": [_in_context(dynamics, texts, at) for at in found],
            }
            for name in CLASSES
            if (found := dynamics.examples(name, EXAMPLES))
        ],
    }


def _classes(dynamics: TokenDynamics) -> list[list[str]]:
    """Head and rows: share of each class, its mean losses at both ends."""
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    rows = [["class", "share", f"mean loss at {first:,}", f"at {last:,}"]]
    for name in CLASSES:
        curve, share = dynamics.mean_curve(name), dynamics.share(name)
        losses = [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"] if share else ["", ""]
        rows.append([_title(name), f"{share:.1%}", *losses])
    return rows


def _transitions(dynamics: TokenDynamics) -> list[list[str]]:
    """Head and rows: of the tokens that were high, or low, what part was so at the end."""
    rows = [["", "share", "to high", "to low"]]
    for name, start in (("high", "H"), ("low", "L")):
        ends = [dynamics.share(f"{start}->{end}") for end in "HL"]
        parts = [f"{end / sum(ends):.1%}" if sum(ends) else "" for end in ends]
        rows.append([f"from {name}", f"{sum(ends):.1%}", *parts])
    return rows


def _title(name: str) -> str:
    return f"{_arrow(name)} {EXPLAINED[name]}"


def _arrow(name: str) -> str:
    return name.replace("->", "\u2192")


def _in_context(dynamics: TokenDynamics, texts: list[str], at: int) -> tuple[str, str, str, str]:
    """Text before, of and after a token of the same sample, and what became of its loss."""
    own = dynamics.samples == dynamics.samples[at]
    before = [n for n in range(max(0, at - CONTEXT), at) if own[n]]
    after = [n for n in range(at + 1, min(len(texts), at + 1 + CONTEXT)) if own[n]]
    start, end = dynamics.losses[0, at], dynamics.losses[-1, at]
    join = ("".join(texts[n] for n in part) for part in (before, [at], after))
    left, token, right = (part.replace("\n", "") for part in join)
    return left, token, right, f"{start:.2f} \u2192 {end:.2f} nats"
