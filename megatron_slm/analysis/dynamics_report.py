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


def write_dynamics(dumps: Path, directory: Path, tokenizer_model: str | None) -> None:
    """Classify the tokens of a directory of dumps; write the table and the plots, print the shares.

    Raises:
        UserError: as read_dumps and classify; no such tokenizer.
    """
    check_libraries()
    read = read_dumps(dumps)
    dynamics = classify(read)
    unique, at = np.unique(dynamics.tokens, return_inverse=True)
    shown = token_texts(dump_tokenizer(read, tokenizer_model), unique.tolist())
    table = write_table(directory, dynamics, [shown[number] for number in at.tolist()])
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    print(f"{len(dynamics.tokens):,} tokens, iterations {first} to {last}")
    print(f"{'':6}{'share':>8}{f'loss at {first}':>16}{f'loss at {last}':>16}")
    for name in CLASSES:
        curve = dynamics.mean_curve(name)
        print(f"{name:6}{dynamics.share(name):8.1%}{curve[0]:16.4f}{curve[-1]:16.4f}")
    for path in [table, *plot(directory, dynamics)]:
        print(f"> {path}")


def dynamics_section(table: Path) -> dict[str, Any]:
    """What the page shows of a table: shares, transitions, curves, examples."""
    dynamics, texts = read_table(table)
    first, last = dynamics.iterations[0], dynamics.iterations[-1]
    rows = []
    for name in CLASSES:
        curve = dynamics.mean_curve(name)
        share = dynamics.share(name)
        losses = [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"] if share else ["", ""]
        rows.append([f"{_arrow(name)} {EXPLAINED[name]}", f"{share:.1%}", *losses])
    transitions = [
        [
            f"from {start}",
            *(f"{dynamics.share(f'{start[0].upper()}->{end}'):.1%}" for end in ("H", "L")),
        ]
        for start in ("high", "low")
    ]
    curves = [
        line(
            f"{_arrow(name)} ({dynamics.share(name):.0%})",
            dynamics.iterations,
            dynamics.mean_curve(name).tolist(),
            ROLES[name],
            mode="lines+markers",
        )
        for name in CLASSES
        if dynamics.share(name) > 0
    ]
    return {
        "lead": f"{len(texts):,} tokens at {len(dynamics.iterations)} iterations. A token "
        "is H\u2192L or L\u2192H if the line fitted to its losses falls or rises by more than 0.2 "
        "nats, else L\u2192L or H\u2192H by whether its last loss is above the mean.",
        "tables": [
            {
                "title": "Classes",
                "head": ["class", "share", f"mean loss at {first:,}", f"at {last:,}"],
                "rows": rows,
            },
            {"title": "Transitions", "head": ["", "to high", "to low"], "rows": transitions},
        ],
        "figures": [figure("Mean loss of each class", "iteration", "nats a token", curves)],
        "examples": [
            {
                "title": f"{_arrow(name)} {EXPLAINED[name]}",
                "tokens": [_in_context(dynamics, texts, at) for at in found],
            }
            for name in CLASSES
            if (found := dynamics.examples(name, EXAMPLES))
        ],
    }


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
