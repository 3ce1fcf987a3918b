"""What a run left behind: TensorBoard's scalars, token dumps, token dynamics.

RUN/tensorboard/events.out.tfevents.*                    or the events in RUN itself
RUN/dump/iter_*.safetensors                              or in a directory of checkpoints in RUN
RUN/dynamics/token_dynamics.parquet
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
    """A scalar over iterations; both of one length, in the order of iterations, finite."""

    iterations: list[int]
    values: list[float]

    @property
    def last(self) -> float:
        return self.values[-1]


@dataclass(frozen=True)
class RunFiles:
    """scalars: by TensorBoard's tag.  settings: arguments.  dumps: empty if there are none."""

    name: str
    directory: Path
    scalars: dict[str, Series] = field(default_factory=dict)
    settings: RunSettings = field(default_factory=RunSettings)
    dumps: list[TokenDump] = field(default_factory=list)
    dynamics: Path | None = None


def read_run_files(directory: Path) -> RunFiles:
    """
    Raises:
        UserError: no such directory, nothing in it that a report is made of, or damaged.
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
            scalars[tag] = Series(list(known), list(known.values()))
    return scalars
