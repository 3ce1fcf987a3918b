"""The table at the end of quickstart.sh, read from what its runs logged."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(directory: Path, tag: str) -> list[float]:
    """Values of a TensorBoard scalar in the order of iterations."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def validation(log: Path, name: str) -> float:
    """A value of the one validation in a run's log."""
    return float(re.search(rf"on validation set .*\| {name} value: (\S+)", log.read_text())[1])


def main(runs: Path, tokens_per_step: int) -> None:
    """Print one row for each method: final losses on held-out target text, and speed."""
    columns = ("target loss", "selected", "unselected", "tokens/s")
    print(f"{'':6}" + "".join(f"{name:>13}" for name in columns))
    target = {}
    for method in ("clm", "slm"):
        log = runs / "logs" / f"{method}-evaluation.log"
        losses = [validation(log, name) for name in ("lm loss", "selected loss", "unselected loss")]
        step = statistics.median(scalars(runs / method / "tensorboard", "iteration-time"))
        target[method] = losses[0]
        print(
            f"{method.upper():6}"
            + "".join(f"{loss:13.4f}" for loss in losses)
            + f"{tokens_per_step / step:13,.0f}"
        )
    better = min(target, key=lambda method: target[method])
    margin = abs(target["clm"] - target["slm"])
    print(
        f"\n{better.upper()} has the lower loss on the target domain here, by {margin:.4f} nats a "
        "token.\nThis is a demonstration on minutes of training, not evidence for either method."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
