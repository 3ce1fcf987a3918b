"""Time the device for Megatron's log without making the host wait for it.

Megatron's own timers wait for the device at every start and stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.timers import TimerBase
from megatron.training import get_timers


def device_timer(name: str) -> DeviceTimer:
    """Return the timer of this name; Megatron's log then includes it."""
    timers = get_timers()
    if name not in timers._timers:
        timers._timers[name] = DeviceTimer(name)
        timers._log_levels[name] = 0
    timer: DeviceTimer = timers(name, log_level=0)
    return timer


@contextmanager
def timed(name: str, when: bool = True) -> Iterator[None]:
    """Count the device's time for the block in a timer of Megatron's log."""
    if not when:
        yield
        return
    timer = device_timer(name)
    timer.start()
    yield
    timer.stop()


class DeviceTimer(TimerBase):
    """Times what the device does between start and stop, by events in its stream."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.seconds = 0.0
        self.begun: Any = None
        self.pending: deque[tuple[Any, Any]] = deque()  # starts and ends not yet added

    def start(self, barrier: bool = False) -> None:
        self.begun = _event_now()

    def stop(self, barrier: bool = False) -> None:
        self.pending.append((self.begun, _event_now()))
        while self.pending and self.pending[0][1].query():  # this does not wait
            self._add(*self.pending.popleft())

    def reset(self) -> None:
        self.seconds = 0.0
        self.pending.clear()

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Wait for the device, and return the seconds since the last reset."""
        while self.pending:
            begun, ended = self.pending.popleft()
            ended.synchronize()
            self._add(begun, ended)
        seconds = self.seconds
        if reset:
            self.reset()
        return seconds

    def _add(self, begun: Any, ended: Any) -> None:
        self.seconds += begun.elapsed_time(ended) / 1000


def _event_now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
