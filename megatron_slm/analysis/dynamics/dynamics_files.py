"""Write and read token dynamics: a Parquet table with one row per token, and plots as PNG and SVG.

The table's columns:

    sample, position, token, text      identify the token
    document                           is its document's number in the sample, where documents do
                                       not see each other
    domain                             is the name of its dataset, where it is known
    class, delta                       are computed by token_dynamics.py
    learning_time, learning_width      are computed by learning_times.py, where there are enough
                                       checkpoints; null for a token that was not learned
    loss_0000100, ...                  hold its loss in nats, float32, at each checkpoint
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.analysis.dynamics.learning_times import LearningTimes
from megatron_slm.analysis.dynamics.token_dynamics import CLASSES, TokenDynamics
from megatron_slm.errors import UserError
from megatron_slm.files import open_regular, writing

TABLE = "token_dynamics.parquet"
LOSS = re.compile(r"loss_\d{1,15}")
LEARNING = ("learning_time", "learning_width")
MOST_VALUES = 1 << 28
PLOTS = ("token_dynamics.png", "token_dynamics.svg")
# Okabe and Ito's colour-blind-safe palette; the dashes tell the lines apart without any colour.
STYLES = {
    "H->H": ("#d55e00", "-"),
    "H->L": ("#0072b2", "--"),
    "L->H": ("#cc79a7", "-."),
    "L->L": ("#009e73", ":"),
}


def check_libraries() -> None:
    """Check that the libraries for tables and plots are installed.

    Raises:
        UserError: pyarrow or matplotlib is missing.
    """
    try:
        import matplotlib
        import pyarrow  # noqa: F401

        matplotlib.use("agg")
    except ImportError as error:
        raise UserError(
            f"token dynamics need {error.name}: pip install 'megatron-slm[analysis]'"
        ) from error


def write_dynamics_table(
    directory: Path, dynamics: TokenDynamics, texts: list[str], found: LearningTimes | None
) -> Path:
    """Write the table of T tokens, completely or not at all, and return its path.

    Args:
        directory: where the table goes; created if it does not exist.
        texts: [T], the text shown for each token.
        found: when each was learned; None for too few checkpoints.

    Raises:
        UserError: the directory cannot be written to, or the table would be too large to be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "sample": dynamics.samples,
        "position": dynamics.positions,
        "token": dynamics.tokens,
        **({} if dynamics.documents is None else {"document": dynamics.documents}),
        **({} if dynamics.domains is None else {"domain": _strings(dynamics.domains.tolist())}),
        "text": _strings(texts),
        "class": pa.DictionaryArray.from_arrays(dynamics.classes, list(CLASSES)),
        "delta": dynamics.delta,
        **({} if found is None else dict(zip(LEARNING, _nulls(found), strict=True))),
    } | {
        f"loss_{iteration:07d}": losses
        for iteration, losses in zip(dynamics.iterations, dynamics.losses, strict=True)
    }
    path = directory / TABLE
    if (values := len(texts) * len(columns)) > MOST_VALUES:
        raise UserError(
            f"{path} would have {values:,} values; {MOST_VALUES:,} can be read: take fewer dumps"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with writing(path) as unfinished, unfinished.open("wb") as file:
        parquet.write_table(pa.table(columns), file, compression="zstd")
    return path


def _strings(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string()).dictionary_encode()


def _nulls(found: LearningTimes) -> list[Any]:
    """Return the columns LEARNING, with a null in place of each NaN."""
    import pyarrow as pa

    return [pa.array(each, from_pandas=True) for each in (found.times, found.widths)]


def read_dynamics_table(path: Path) -> tuple[TokenDynamics, list[str]]:
    """Read a table; return the dynamics of its T tokens and their texts, [T].

    Raises:
        UserError: pyarrow is missing, the file is not such a table, or it is damaged.
    """
    try:
        import pyarrow as pa
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'megatron-slm[analysis]'") from error
    try:
        with open_regular(path) as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if file.metadata.num_rows * len(names) > MOST_VALUES:
                raise UserError(f"{path} has more than {MOST_VALUES:,} values, too many to be read")
            losses = [name for name in names if LOSS.fullmatch(name)]
            text = pa.dictionary(pa.int32(), pa.string())
            kinds = dict.fromkeys(("sample", "position", "token"), pa.int64())
            kinds |= {"text": text, "class": pa.dictionary(pa.int8(), pa.string())}
            kinds |= dict.fromkeys(("delta", *losses), pa.float32())
            known = kinds | {"document": pa.int64(), "domain": text}
            known |= dict.fromkeys(LEARNING, pa.float32())
            kinds |= {
                name: known[name] for name in ("document", "domain", *LEARNING) if name in names
            }
            own = dict(zip(names, file.schema_arrow.types, strict=True))
            if own != kinds or len(names) != len(own) or len(losses) < 2:
                raise UserError(f"{path} is not a table of token dynamics: {names[:12]}")
            # When tokens are learned is computed from the losses, which cannot contradict them.
            table = file.read([name for name in names if name not in LEARNING])
    except (OSError, ArrowException, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return _dynamics(path, table, losses)


def _dynamics(path: Path, table: Any, names: list[str]) -> tuple[TokenDynamics, list[str]]:
    """Check the values of a table that has the right columns, and unpack them."""
    column = {name: table[name].combine_chunks() for name in table.column_names}
    classes, texts = (column.pop(name) for name in ("class", "text"))
    domains = column.pop("domain", None)
    parts = [*column.values(), classes, texts, texts.dictionary]
    parts += [] if domains is None else [domains, domains.dictionary]
    if any(part.null_count for part in parts) or not len(table):
        raise UserError(f"{path} is empty or has missing values")
    known_classes, known_texts = (part.dictionary.to_pylist() for part in (classes, texts))
    if not set(known_classes) <= set(CLASSES):
        raise UserError(f"{path} has classes other than {', '.join(CLASSES)}")
    codes = np.array([CLASSES.index(name) for name in known_classes], np.int8)
    iterations = [int(name.removeprefix("loss_")) for name in names]
    numbers = {name: values.to_numpy() for name, values in column.items()}
    if iterations != sorted(set(iterations)) or not all(
        np.isfinite(values).all() for values in numbers.values()
    ):
        raise UserError(f"{path} has iterations out of order, or values that are NaN or infinite")
    dynamics = TokenDynamics(
        iterations=iterations,
        losses=np.stack([numbers[name] for name in names]),
        classes=codes[classes.indices.to_numpy()],
        delta=numbers["delta"],
        samples=numbers["sample"],
        positions=numbers["position"],
        tokens=numbers["token"],
        documents=numbers.get("document"),
        domains=None
        if domains is None
        else np.array(domains.dictionary.to_pylist())[domains.indices.to_numpy()],
    )
    return dynamics, [known_texts[at] for at in texts.indices.to_pylist()]


def plot_dynamics(directory: Path, dynamics: TokenDynamics) -> list[Path]:
    """Plot each class's mean loss over the checkpoints and its share of the tokens.

    Returns:
        The paths of the files written, one per format.
    """
    from matplotlib import pyplot

    figure, (curves, shares) = pyplot.subplots(
        1, 2, figsize=(9, 4), width_ratios=(3, 1), layout="constrained"
    )
    for name, (colour, dashes) in STYLES.items():
        curve = dynamics.mean_curve(name)
        label = f"{name} ({dynamics.share(name):.0%})"
        curves.plot(dynamics.iterations, curve, dashes, color=colour, marker="o", label=label)
        bar = shares.bar(name, dynamics.share(name), color=colour)
        shares.bar_label(bar, fmt="{:.0%}")
    curves.set(xlabel="iteration", ylabel="mean loss (nats)")
    curves.legend(frameon=False)
    shares.set(ylabel="part of the tokens")
    shares.spines[["top", "right"]].set_visible(False)
    paths = [directory / name for name in PLOTS]
    for path in paths:
        with writing(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=path.suffix[1:])
    pyplot.close(figure)
    return paths
