"""Find and read what a run left behind: TensorBoard's scalars, token dumps and token dynamics.

RUN/tensorboard/events.out.tfevents.*      scalars and arguments; the events may also be in RUN
RUN/dump/iter_*.safetensors                token dumps; they may also be in RUN/*/dump
RUN/dynamics/token_dynamics.parquet        token dynamics
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.analysis.event_files import Events, read_events
from megatron_slm.analysis.report.settings import RunSettings
from megatron_slm.analysis.report.token_map import MOST_DUMPS
from megatron_slm.data.token_dump import TokenDump, read_dumps
from megatron_slm.errors import UserError

DUMPS = "iter_*.safetensors"
DYNAMICS_TABLE = Path("dynamics") / "token_dynamics.parquet"


@dataclass(frozen=True)
class Series:
    """A scalar over iterations."""

    iterations: list[int]
    """Iterations, ascending."""

    values: list[float]
    """The scalar's value at each of them; all are finite."""

    lost: int | None = None
    """The iteration from which on no value is finite; None if the last one is."""

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]


@dataclass(frozen=True)
class RunFiles:
    """What a run left behind; anything but the directory may be missing."""

    name: str
    """Name of the run's directory."""

    directory: Path
    """The run's directory."""

    scalars: dict[str, Series] = field(default_factory=dict)
    """Scalars by TensorBoard's tag."""

    settings: RunSettings = field(default_factory=RunSettings)
    """The run's arguments."""

    dumps: list[TokenDump] = field(default_factory=list)
    """Token dumps, by ascending iteration."""

    dynamics: Path | None = None
    """The table of token dynamics."""


def read_run_files(directory: Path) -> RunFiles:
    """Read a run's directory.

    Raises:
        UserError: it is not a directory, has nothing to report on, or has a damaged file.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    logs = directory / "tensorboard"
    logs = logs if logs.is_dir() else directory
    events = read_events(logs)
    dumps = next((each for each in _dump_directories(directory) if any(each.glob(DUMPS))), None)
    dynamics = directory / DYNAMICS_TABLE
    found = RunFiles(
        name=directory.resolve().name,
        directory=directory,
        scalars=_series(events),
        settings=RunSettings(events.texts),
        dumps=[] if dumps is None else read_dumps(dumps, most=MOST_DUMPS),
        dynamics=dynamics if dynamics.is_file() else None,
    )
    if not (found.scalars or found.dumps or found.dynamics):
        raise UserError(
            f"{directory} has neither TensorBoard's events (tensorboard/), nor token dumps "
            "(dump/), nor token dynamics (dynamics/)"
        )
    return found


def _dump_directories(directory: Path) -> list[Path]:
    return [directory / "dump", *sorted(directory.glob("*/dump"))]


def _series(events: Events) -> dict[str, Series]:
    scalars = {}
    for tag, points in events.scalars.items():
        known = {at: value for at, value in points.items() if math.isfinite(value)}
        if known:
            last = next(reversed(known))
            lost = next((at for at in points if at > last), None)
            scalars[tag] = Series(list(known), list(known.values()), lost)
    return scalars
