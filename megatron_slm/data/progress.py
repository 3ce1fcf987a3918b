"""What a run shows of itself: counters that all its processes share, and a bar on stderr."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from megatron_slm.data.inputs import Task

POLL = 0.5  # seconds between looks at the counters
STOP = 4  # the counter that tells workers to stop, after those of Progress

# Hears of progress: input bytes, documents, tokens, characters.
Progress = Callable[[int, int, int, int], None]


class Stopped(Exception):
    """Another task has failed."""


class Counters:
    """Input bytes, documents, tokens and characters, over all processes."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork")
        self.shared = self.context.Array("q", STOP + 1)

    def add(self, *counts: int) -> None:
        """A Progress."""
        add_to(self.shared, *counts)


def add_to(shared: Any, *counts: int) -> None:
    """Count, or leave the task if it is to stop."""
    with shared.get_lock():
        if shared[STOP]:
            raise Stopped
        for at, count in enumerate(counts):
            shared[at] += count


class Bar:
    """Progress on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, label: str, tasks: Sequence[Task], counters: Counters) -> None:
        self.counters = counters
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(task.size for task in tasks),
            desc=label,
            unit="B",
            unit_scale=True,
            mininterval=POLL if terminal else 10,
            ascii=not terminal,
        )

    def show(self) -> None:
        """Draw what the counters say."""
        size, documents, tokens, characters = self.counters.shared[:STOP]
        seconds = self.bar.format_dict["elapsed"] or 1
        self.bar.set_postfix_str(
            f"{documents:,} documents, {tokens:,} tokens, {tokens / seconds / 1e6:.2f} Mtok/s, "
            f"{characters / seconds / 1e6:.1f} MB/s of text",
            refresh=False,
        )
        self.bar.update(size - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def say(line: str) -> None:
    """To people; results go to stdout."""
    print(f"> {line}", file=sys.stderr, flush=True)
