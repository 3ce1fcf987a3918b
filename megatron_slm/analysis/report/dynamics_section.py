"""Make the section of a page that shows a run's token dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.dynamics.dynamics_files import read_dynamics_table
from megatron_slm.analysis.dynamics.learning_times import (
    LEAST_CHECKPOINTS,
    LearningTimes,
    learning_times,
    spectrum,
)
from megatron_slm.analysis.dynamics.rows import (
    EXAMPLES,
    by_domain,
    by_kind,
    class_rows,
    class_title,
    in_context,
    learning_rows,
    transition_rows,
)
from megatron_slm.analysis.dynamics.token_dynamics import CLASSES, TokenDynamics
from megatron_slm.analysis.report.figures import curve, figure

CLASS_ROLES = {"H->H": 1, "H->L": 0, "L->H": 3, "L->L": 2}


def dynamics_section(table: Path) -> dict[str, Any]:
    """Return what the page shows of a table: shares, transitions, learning times, curves and
    examples.

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
    learning = learning_times(dynamics.iterations, dynamics.losses)
    all_tokens = {"all tokens": np.ones(len(texts), np.bool_)}
    domains, kinds = by_domain(dynamics), by_kind(dynamics, texts)
    tables = {"Classes": class_rows(dynamics), "Transitions": transition_rows(dynamics)}
    figures = [figure("Mean loss of each class", "iteration", "nats a token", curves)]
    if learning is not None:
        tables["When tokens are learned"] = learning_rows(learning, all_tokens | domains | kinds)
        figures += [
            _spectrum(f"Learning-time spectrum{what}", dynamics, learning, groups)
            for what, groups in (
                (" by domain" if domains else "", all_tokens | domains),
                (" by kind of token", kinds),
            )
        ]
    return {
        "lead": f"{len(texts):,} tokens at {len(dynamics.iterations)} iterations. A token "
        "is H\u2192L or L\u2192H if the line fitted to its losses falls or rises by more than 0.2 "
        "nats, else L\u2192L or H\u2192H by whether its last loss is above the mean. "
        + _how_read(learning),
        "tables": [
            {"title": title, "head": head, "rows": rows} for title, (head, *rows) in tables.items()
        ],
        "figures": figures,
        "examples": [
            {
                "title": class_title(name),
                "tokens": [in_context(dynamics, texts, at) for at in found],
            }
            for name in CLASSES
            if (found := dynamics.examples(name, EXAMPLES))
        ],
    }


def _how_read(found: LearningTimes | None) -> str:
    if found is None:
        return f"When tokens are learned is read from {LEAST_CHECKPOINTS} iterations or more."
    return (
        "It counts as learned if a sigmoid over the logarithm of the iteration falls by more than "
        "0.2 nats and fits its losses better than noise would; its learning time is when half of "
        "the fall has happened."
    )


def _spectrum(
    title: str,
    dynamics: TokenDynamics,
    found: LearningTimes,
    groups: dict[str, NDArray[np.bool_]],
) -> dict[str, Any]:
    """Return the figure of the learning-time spectra of groups of tokens."""
    lines = [
        curve(name, *spectrum(dynamics.iterations, found, own), role, points=True)
        for role, (name, own) in enumerate(groups.items())
    ]
    return figure(
        title,
        "1 + iteration",
        "% of the tokens learned per tenfold",
        lines,
        note="The area below a line is the percentage of its tokens that are learned.",
        powers=True,
    )
