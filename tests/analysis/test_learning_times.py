"""When tokens are learned: on curves whose time and width are known, on noise, and on what no
sigmoid can be fitted to; and the groups of tokens that it is shown for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from megatron_slm.analysis.dynamics.dynamics_files import read_dynamics_table, write_dynamics_table
from megatron_slm.analysis.dynamics.learning_times import (
    LearningTimes,
    learning_times,
    spectrum,
)
from megatron_slm.analysis.dynamics.rows import MOST_DOMAINS, by_domain, by_kind, learning_rows
from megatron_slm.analysis.dynamics.token_dynamics import TokenDynamics
from megatron_slm.analysis.report.dynamics_section import dynamics_section
from megatron_slm.errors import UserError

EVEN = list(range(0, 2001, 100))
UNEVEN = [0, 3, 10, 30, 100, 300, 1000, 3000]


def curves(
    iterations: list[int], times: np.ndarray, widths: np.ndarray, falls: np.ndarray
) -> np.ndarray:
    """Return losses, [K, T], that fall to 1 nat."""
    x = np.log(1 + np.array(iterations, float))[:, None]
    return (1 + falls / (1 + np.exp((x - np.log(1 + times)) / widths))).astype(np.float32)


def fitted(iterations: list[int], losses: np.ndarray) -> LearningTimes:
    found = learning_times(iterations, losses)
    assert found is not None
    return found


# Between the first two of the even checkpoints, a time cannot be told on a logarithmic scale.
@pytest.mark.parametrize(("iterations", "first"), [(EVEN, 0.65), (UNEVEN, 0.2)])
def test_known_curves(iterations: list[int], first: float) -> None:
    draw = np.random.default_rng(3)
    whole = np.log(1 + iterations[-1])
    x = draw.uniform(first, 0.9, 2000) * whole
    widths = draw.uniform(0.03, 0.12, 2000) * whole
    losses = curves(iterations, np.expm1(x), widths, draw.uniform(0.5, 8, 2000))
    found = fitted(iterations, losses)
    assert found.learned.mean() > 0.99
    seen = found.learned
    off = np.abs(np.log1p(found.times[seen]) - x[seen]) / whole
    assert np.median(off) < 0.01 and np.quantile(off, 0.95) < 0.05


def test_no_curve_fits_better() -> None:
    """Than the one that was found, by least squares of numpy for each curve of a grid."""
    draw = np.random.default_rng(5)
    times, widths = np.array([20.0, 90.0, 700.0]), np.array([0.2, 0.6, 1.5])
    losses = curves(UNEVEN, times, widths, np.array([2.0, 4.0, 3.0]))
    losses += draw.normal(0, 0.1, losses.shape).astype(np.float32)
    found = fitted(UNEVEN, losses)
    assert found.learned.all()
    x = np.log(1 + np.array(UNEVEN, float))

    def left(own: np.ndarray, time: float, width: float) -> float:
        sigmoid = 1 / (1 + np.exp((x - time) / width))
        basis = np.stack([np.ones_like(x), sigmoid], 1)
        return float(((basis @ np.linalg.lstsq(basis, own, rcond=None)[0] - own) ** 2).sum())

    narrowest = x[-1] / (len(x) - 1) / 4
    for at in range(3):
        own = losses[:, at].astype(float)
        best = min(
            left(own, time, width)
            for time in np.linspace(0, x[-1], 64)
            for width in np.geomspace(narrowest, x[-1] / 2, 24)
        )
        here = left(own, float(np.log1p(found.times[at])), float(found.widths[at]))
        assert here == pytest.approx(best, rel=1e-3)


def test_a_step_lies_between_two_checkpoints() -> None:
    losses = np.where(np.array(UNEVEN)[:, None] < 100, 4.0, 0.5).astype(np.float32)
    found = fitted(UNEVEN, losses)
    assert 30 < found.times[0] < 100
    assert 9 ** found.widths[0] < 3  # narrower than the checkpoints' distance


def test_what_is_not_learned() -> None:
    fall = curves(EVEN, np.array([300.0]), np.array([0.3]), np.array([3.0]))
    kinds = {
        "learned": fall,
        "flat": np.full_like(fall, 2.5),
        "zero": np.zeros_like(fall),
        "rises": 5 - fall,
        "falls too little": 1 + (fall - 1) / 20,
        "NaN": np.where(np.arange(len(fall))[:, None] == 7, np.nan, fall),
        "infinite": np.where(np.arange(len(fall))[:, None] == 0, np.inf, fall),
    }
    losses = np.concatenate(list(kinds.values()), axis=1).astype(np.float32)
    found = fitted(EVEN, losses)
    assert dict(zip(kinds, found.learned.tolist(), strict=True)) == {
        name: name == "learned" for name in kinds
    }
    assert np.isnan(found.widths[1:]).all()
    assert learning_times(EVEN[:4], losses[:4]) is None
    assert not fitted(EVEN[:5], losses[:5, 1:4]).learned.any()


@pytest.mark.parametrize("iterations", [EVEN, UNEVEN, EVEN[:5]], ids=["even", "uneven", "five"])
def test_noise_is_not_learned(iterations: list[int]) -> None:
    noise = np.random.default_rng(1).normal(3, 0.5, (len(iterations), 10_000))
    assert fitted(iterations, noise.astype(np.float32)).learned.mean() < 0.03


def test_the_spectrum() -> None:
    """Its area is what is learned, each token in the interval that its time is in."""
    times = np.array([5, 5, 20, 50, 2999, np.nan, np.nan, 0], np.float32)
    found = LearningTimes(times, np.where(np.isnan(times), np.nan, 0.5).astype(np.float32))
    everything, first = np.ones(8, bool), np.arange(8) < 4
    at, shares = spectrum(UNEVEN, found, everything)
    edges = np.log10(1 + np.array(UNEVEN, float))
    np.testing.assert_allclose(at, (edges[1:] + edges[:-1]) / 2)
    np.testing.assert_allclose(
        shares * np.diff(edges), 100 * np.array([1, 2, 1, 1, 0, 0, 1]) / 8, rtol=1e-6
    )
    _, shares = spectrum(UNEVEN, found, first)
    assert (shares * np.diff(edges)).sum() == pytest.approx(100)
    at, shares = spectrum(list(range(100)), found, everything)
    assert len(at) <= 25 and at == sorted(at)
    rows = learning_rows(found, {"all": everything, "first": first, "last": ~first & (at[0] > 0)})
    assert rows[1] == ["all", "8", "75.0%", "12", "a factor of 3"]
    assert rows[2][:3] == ["first", "4", "100.0%"]


TEXTS = {
    "word start": [" the", "The", "x"],
    "inside word": ["ing", "'s"],
    "number": [" 12", "7", "3.5"],
    "code": [" (", "self._x", "==", "x=1"],
    "markup": ["<br", "</", "&amp", "\\frac"],
    "punctuation": [",", " .", "!?"],
    "space": [" ", "\u21b5\n", "\u2192\t"],
    "other": ["\u27e8C3\u27e9", "\u27e8123\u27e9"],
}


def dynamics(losses: np.ndarray, iterations: list[int]) -> TokenDynamics:
    count = losses.shape[1]
    return TokenDynamics(
        iterations=iterations,
        losses=losses,
        classes=np.zeros(count, np.int8),
        delta=np.zeros(count, np.float32),
        samples=np.zeros(count, np.int64),
        positions=np.arange(1, count + 1),
        tokens=np.arange(count),
    )


def test_kinds_of_tokens() -> None:
    """A word begins after what is no letter; after a masked token, that is not known."""
    texts = ["Token", *(text for name in TEXTS for text in TEXTS[name])]
    texts[2:4] = ["\u21b5\nThe", " x"]  # so that all stand after no letter
    one = dynamics(np.zeros((2, len(texts)), np.float32), [0, 1])
    kinds = by_kind(one, texts)
    found = {name: [texts[at] for at in np.flatnonzero(own)] for name, own in kinds.items()}
    assert found == TEXTS | {"word start": ["Token", " the", "\u21b5\nThe", " x"]}
    pair = replace(one, samples=np.zeros(2, np.int64), positions=np.array([1, 2]))
    assert list(by_kind(pair, ["learn", "ing"])) == ["word start", "inside word"]
    for apart in ({"samples": np.array([0, 1])}, {"positions": np.array([1, 3])}):
        assert list(by_kind(replace(pair, **apart), ["learn", "ing"])) == ["word start"]


def test_the_table_and_the_page(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    times, widths = draw.uniform(10, 1000, 30), np.full(30, 0.2)
    losses = curves(UNEVEN, times, widths, np.full(30, 3.0))
    losses[:, 7] = 2.0  # flat
    domains = np.array([f"domain {number % 15}" for number in range(30)])
    one = replace(dynamics(losses, UNEVEN), domains=domains)
    found = fitted(UNEVEN, losses)
    texts = [" word", "ing"] * 15
    path = write_dynamics_table(tmp_path / "one", one, texts, found)
    columns = parquet.read_table(path).to_pydict()
    assert columns["domain"] == domains.tolist()
    assert columns["learning_time"][7] is None and columns["learning_width"][7] is None
    assert columns["learning_time"][0] == found.times[0]
    read, _ = read_dynamics_table(path)
    assert np.array_equal(read.losses, losses) and np.array_equal(read.domains, domains)
    assert len(by_domain(read)) == MOST_DOMAINS
    section = dynamics_section(path)
    assert [table["title"] for table in section["tables"]][2] == "When tokens are learned"
    titles = [figure["title"] for figure in section["figures"][1:]]
    assert titles == [f"Learning-time spectrum by {what}" for what in ("domain", "kind of token")]
    # With few checkpoints, and without domains, as dumps of validation data have none.
    short = dynamics(losses[:4], UNEVEN[:4])
    path = write_dynamics_table(tmp_path / "short", short, texts, None)
    assert "learning_time" not in parquet.read_table(path).column_names
    section = dynamics_section(path)
    assert len(section["tables"]) == 2 and "5 iterations or more" in section["lead"]
    damaged = parquet.read_table(path).append_column("domain", [[1] * 30])
    parquet.write_table(damaged, path)
    with pytest.raises(UserError, match="not a table of token dynamics"):
        read_dynamics_table(path)
