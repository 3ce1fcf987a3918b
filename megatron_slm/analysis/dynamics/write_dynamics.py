"""Turn token dumps into token dynamics: write a table and plots, print shares and examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_slm.analysis.dynamics.dynamics_files import (
    check_libraries,
    plot_dynamics,
    write_dynamics_table,
)
from megatron_slm.analysis.dynamics.learning_times import learning_times
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
from megatron_slm.analysis.dynamics.token_dynamics import CLASSES, classify
from megatron_slm.analysis.token_text import dump_tokenizer, token_texts
from megatron_slm.data.token_dump import read_dumps


def write_dynamics(
    dumps: Path, directory: Path, tokenizer_model: str | None, iterations: list[int] | None = None
) -> None:
    """Classify the tokens of a directory of dumps; write the table and the plots, and print the
    shares, transitions, learning times and examples.

    Args:
        dumps: directory of the dumps.
        directory: where the table and the plots go.
        tokenizer_model: tokenizer to use in place of the one that the dumps name.
        iterations: iterations of the dumps to use; None for all.

    Raises:
        UserError: a library is missing, the dumps cannot be read or classified, or there is no such
            tokenizer.
    """
    check_libraries()
    read = read_dumps(dumps, iterations)
    dynamics = classify(read)
    unique, numbers = np.unique(dynamics.tokens, return_inverse=True)
    shown = token_texts(dump_tokenizer(read, tokenizer_model), unique.tolist())
    texts = [shown[number] for number in numbers.tolist()]
    found = learning_times(dynamics.iterations, dynamics.losses)
    table = write_dynamics_table(directory, dynamics, texts, found)
    print(f"{len(texts):,} tokens at {len(dynamics.iterations)} iterations")
    tables = [class_rows(dynamics), transition_rows(dynamics)]
    if found is not None:
        everything = {"all": np.ones(len(texts), np.bool_)}
        groups = everything | by_domain(dynamics) | by_kind(dynamics, texts)
        tables.append(learning_rows(found, groups))
    for head, *rows in tables:
        print()
        for first, *others in [head, *rows]:
            print(f"{first:20}" + "".join(f"{value:>22}" for value in others))
    for name in CLASSES:
        print(f"\n{class_title(name)}")
        for at in dynamics.examples(name, EXAMPLES):
            before, token, after, note = in_context(dynamics, texts, at)
            print(f"  {before}[{token}]{after}   {note}")
    print()
    for path in [table, *plot_dynamics(directory, dynamics)]:
        print(f"> {path}")
