"""Token dynamics on disk: a row a token as parquet, the classes' curves as PNG and SVG.

sample, position, token, text      which token it is
class, delta                       by token_dynamics.py
loss_0000100, ...                  its loss in nats, float32, at each checkpoint
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_slm.analysis.token_dynamics import CLASSES, TokenDynamics
from megatron_slm.errors import UserError
from megatron_slm.files import publish, sync, temporary

TABLE = "token_dynamics.parquet"
PLOTS = ("token_dynamics.png", "token_dynamics.svg")
# Told apart without colour by their dashes; colours of Okabe and Ito.
STYLES = {
    "H->H": ("#d55e00", "-"),
    "H->L": ("#0072b2", "--"),
    "L->H": ("#cc79a7", "-."),
    "L->L": ("#009e73", ":"),
}


def check_libraries() -> None:
    """
    Raises:
        UserError: those that tables and plots need are not installed.
    """
    try:
        import matplotlib
        import pyarrow  # noqa: F401

        matplotlib.use("agg")
    except ImportError as error:
        raise UserError(
            f"token dynamics need {error.name}: pip install 'megatron-slm[analysis]'"
        ) from error


def write_table(directory: Path, dynamics: TokenDynamics, texts: list[str]) -> Path:
    """Write the table, whole or not at all.

    Args:
        texts: of each token, as shown.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "sample": dynamics.samples,
        "position": dynamics.positions,
        "token": dynamics.tokens,
        "text": pa.array(texts, pa.string()).dictionary_encode(),
        "class": pa.DictionaryArray.from_arrays(dynamics.classes, list(CLASSES)),
        "delta": dynamics.delta,
    } | {
        f"loss_{iteration:07d}": losses
        for iteration, losses in zip(dynamics.iterations, dynamics.losses, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / TABLE
    unfinished = temporary(path)
    with unfinished.open("wb") as file:
        parquet.write_table(pa.table(columns), file, compression="zstd")
        file.flush()
        sync(file.fileno())
    publish(unfinished, path)
    return path


def read_table(path: Path) -> tuple[TokenDynamics, list[str]]:
    """The dynamics and the tokens' texts.

    Raises:
        UserError: not such a table, or damaged.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install 'megatron-slm[analysis]'") from error
    try:
        table = parquet.read_table(path)
        names = [name for name in table.column_names if name.startswith("loss_")]
        column = {name: table[name] for name in table.column_names}
        classes = column["class"].combine_chunks().cast("string").to_pylist()
        numbers = {name: number for number, name in enumerate(CLASSES)}
        dynamics = TokenDynamics(
            iterations=[int(name.removeprefix("loss_")) for name in names],
            losses=np.stack([column[name].to_numpy() for name in names]),
            classes=np.array([numbers[name] for name in classes], np.int8),
            delta=column["delta"].to_numpy(),
            samples=column["sample"].to_numpy(),
            positions=column["position"].to_numpy(),
            tokens=column["token"].to_numpy(),
        )
        return dynamics, column["text"].combine_chunks().cast("string").to_pylist()
    except (OSError, ArrowException, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def plot(directory: Path, dynamics: TokenDynamics) -> list[Path]:
    """Mean loss of each class over the checkpoints, and the classes' shares."""
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
        unfinished = temporary(path)
        figure.savefig(unfinished, dpi=150, format=path.suffix[1:])
        unfinished.replace(path)
    pyplot.close(figure)
    return paths
