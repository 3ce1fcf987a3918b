"""Run tasks on all cores: one process per core, which share nothing but progress counts.

Workers are forked, so that what they need is loaded once and its memory is shared.  They end with
their parent, however it ends.  The first task that fails stops the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from typing import Any

from megatron_slm.corpus.progress import POLL, Bar, Counters, Progress
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.errors import UserError


def over_all_cores[Result](
    label: str, tasks: Sequence[Task], work: Callable[[Task, Progress], Result], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task and its result when it is done; use this process if one is enough.

    Args:
        label: name of the work, for the progress bar.
        tasks: the tasks.
        work: function that does a task. It is forked, so it must not wait for threads.
        workers: number of processes.

    Raises:
        UserError: a task raised it, or a worker was killed.
    """
    if not tasks:
        return
    counters = Counters(len(tasks))
    with closing(Bar(label, sum(task.size for task in tasks), counters)) as bar:
        if min(workers, len(tasks)) == 1:

            def progress(at: int, *counts: int) -> None:
                counters.add(at, *counts)
                bar.show()

            for at, task in enumerate(tasks):
                yield task, work(task, partial(progress, at))
            bar.show()
        else:
            yield from _in_processes(tasks, work, min(workers, len(tasks)), counters, bar)


def _in_processes(
    tasks: Sequence[Task],
    work: Callable[[Task, Progress], Any],
    workers: int,
    counters: Counters,
    bar: Bar,
) -> Iterator[tuple[Task, Any]]:
    pool = ProcessPoolExecutor(workers, counters.context, _start_worker, (work, counters))
    try:
        # Start with the largest, so that none is left running alone at the end.
        largest = sorted(tasks, key=lambda task: -task.size)
        pending = {pool.submit(_in_worker, task, at): task for at, task in enumerate(largest)}
        while pending:
            done, _ = wait(pending, POLL, FIRST_COMPLETED)
            for future in done:
                yield pending.pop(future), future.result()
            bar.show()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended early, perhaps killed for want of memory; run again, with "
            "fewer --workers if so: finished shards are kept"
        ) from error
    finally:
        counters.stop[0] = 1
        pool.shutdown(cancel_futures=True)


_work: Callable[[Task, Progress], Any]
_counters: Counters


def _start_worker(work: Callable[[Task, Progress], Any], counters: Counters) -> None:
    global _work, _counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work, _counters = work, counters


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_worker(task: Task, at: int) -> Any:
    return _work(task, partial(_counters.add, at))
