"""Run tasks on all cores: one process per core, which share nothing but progress counts.

Workers are forked, so that what they need is loaded once and its memory is shared.  They end with
their parent, however it ends.  The first task that fails stops the others.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

from megatron_slm.corpus.progress import POLL, Bar, Counters, Progress
from megatron_slm.corpus.reading.inputs import Task
from megatron_slm.errors import UserError

# Of (row of counters, task) to a worker, and of (result, error) from it.  They go as bytes: send()
# and recv() hold views of a BytesIO, and Python 3.12 may crash where Ctrl-C interrupts them.
Pipe = Connection


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
    # Each worker has a pipe of its own, so there is no lock that a killed one could keep: with
    # ProcessPoolExecutor's shared queues, the others wait for it without end.
    # End with the smallest, so that no large one is left running alone.
    waiting = list(enumerate(sorted(tasks, key=lambda task: task.size)))
    pipes: list[Pipe] = []
    processes: list[ForkProcess] = []
    running: dict[Pipe, Task] = {}
    try:
        for _ in range(workers):
            ours, theirs = counters.context.Pipe()
            pipes.append(ours)
            arguments = (theirs, tuple(pipes), work, counters)
            processes.append(counters.context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        idle = list(pipes)
        while waiting or running:
            while waiting and idle:
                at, task = waiting.pop()
                pipe = idle.pop()
                running[pipe] = task
                with _telling_of_killed_workers():
                    pipe.send_bytes(pickle.dumps((at, task)))
            ready = wait(running, POLL)
            for pipe in [pipe for pipe in running if pipe in ready]:
                with _telling_of_killed_workers():
                    result, error = pickle.loads(pipe.recv_bytes())
                idle.append(pipe)
                task = running.pop(pipe)
                if error is not None:
                    raise error
                yield task, result
            bar.show()
    finally:
        counters.stop[0] = 1
        for pipe in pipes:
            pipe.close()  # idle workers end
        for process in processes:
            process.join()


@contextmanager
def _telling_of_killed_workers() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "a worker process ended early, perhaps killed for want of memory; run again, with "
            "fewer --workers if so: finished shards are kept"
        ) from error


def _serve(
    pipe: Pipe,
    pipes: Sequence[Pipe],
    work: Callable[[Task, Progress], Any],
    counters: Counters,
) -> None:
    """Do the tasks that come through a pipe, in a worker.

    Args:
        pipe: the worker's end.
        pipes: the parent's ends, which are open here as well.
        work: function that does a task.
        counters: of all tasks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for end in pipes:
        end.close()
    with suppress(EOFError, ConnectionError):  # the parent needs no more
        while True:
            at, task = pickle.loads(pipe.recv_bytes())
            answer: tuple[Any, Exception | None]
            try:
                answer = work(task, partial(counters.add, at)), None
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                answer = None, error
            pipe.send_bytes(pickle.dumps(answer))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
