"""Make the section of a page that shows a run's token dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_slm.analysis.dynamics.dynamics_files import read_dynamics_table
from megatron_slm.analysis.dynamics.rows import (
    EXAMPLES,
    class_rows,
    class_title,
    in_context,
    transition_rows,
)
from megatron_slm.analysis.dynamics.token_dynamics import CLASSES
from megatron_slm.analysis.report.figures import curve, figure

CLASS_ROLES = {"H->H": 1, "H->L": 0, "L->H": 3, "L->L": 2}


def dynamics_section(table: Path) -> dict[str, Any]:
    """Return what the page shows of a table: shares, transitions, curves and examples.

    Raises:
        UserError: the table cannot be read.
    """
    dynamics, texts = read_dynamics_table(table)
    curves = [
        curve(
            f"{class_title(name)} ({dynamics.share(name):.0%})",
            dynamics.iterations,
            dynamics.mean_curve(name).tolist(),
            CLASS_ROLES[name],
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
                ("Classes", class_rows(dynamics)),
                ("Transitions", transition_rows(dynamics)),
            )
        ],
        "figures": [figure("Mean loss of each class", "iteration", "nats a token", curves)],
        "examples": [
            {
                "title": class_title(name),
                "tokens": [in_context(dynamics, texts, at) for at in found],
            }
            for name in CLASSES
            if (found := dynamics.examples(name, EXAMPLES))
        ],
    }
