"""Show a run's progress: counters that all its processes share, and a bar on stderr."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

POLL = 0.5  # seconds between looks at the counters

# A function that is told of progress: input bytes, documents, tokens, characters.
Progress = Callable[[int, int, int, int], None]


class Stopped(Exception):
    """Another task has failed."""


class Counters:
    """Input bytes, documents, tokens and characters of each task, shared by all processes.

    The counts are int64 [tasks, 4].  Each task counts in its own row, so there is no lock that a
    killed worker could keep.
    """

    def __init__(self, tasks: int) -> None:
        self.context = multiprocessing.get_context("fork")
        shared = np.frombuffer(self.context.RawArray("q", 4 * tasks + 1), np.int64)
        self.counts = shared[:-1].reshape(tasks, 4)
        self.stop = shared[-1:]  # not 0 if all workers should leave their tasks

    def add(self, task: int, *counts: int) -> None:
        """Add to the counts of a task.

        Args:
            task: row of the task.
            counts: input bytes, documents, tokens and characters to add.

        Raises:
            Stopped: another task has failed, so this one should stop.
        """
        if self.stop[0]:
            raise Stopped
        self.counts[task] += counts


class Bar:
    """Progress on stderr: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, label: str, size: int, counters: Counters) -> None:
        self.counters = counters
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=size,
            desc=label,
            unit="B",
            unit_scale=True,
            mininterval=POLL if terminal else 10,
            ascii=not terminal,
        )

    def show(self) -> None:
        """Draw the current counts."""
        size, documents, tokens, characters = self.counters.counts.sum(0).tolist()
        seconds = self.bar.format_dict["elapsed"] or 1
        self.bar.set_postfix_str(
            f"{documents:,} documents, {tokens:,} tokens, {tokens / seconds / 1e6:.2f} Mtok/s, "
            f"{characters / seconds / 1e6:.1f} MB/s of text",
            refresh=False,
        )
        self.bar.update(size - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def announce(line: str) -> None:
    """Print a line for people to stderr; results go to stdout."""
    print(f"> {line}", file=sys.stderr, flush=True)
