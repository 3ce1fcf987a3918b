"""What the ranks of a run left behind: their output, exit codes and logs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Run:
    """directory: where the job ran; outputs, codes: output and exit code of each rank."""

    directory: Path
    outputs: list[str]
    codes: list[int | None]

    def scalars(self, tag: str) -> dict[int, float]:
        """Read a TensorBoard scalar by iteration."""
        events = EventAccumulator(str(self.directory / "tensorboard"))
        events.Reload()
        return {event.step: event.value for event in events.Scalars(tag)}

    def tags(self) -> list[str]:
        events = EventAccumulator(str(self.directory / "tensorboard"))
        events.Reload()
        return events.Tags()["scalars"]
