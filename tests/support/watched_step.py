"""megatron_slm.pretrain on a GPU, which prints where its 4th step waits, and profiles the 5th.

Printed as lines "wait NUMBER PLACE", NUMBER in the whole step, and "profile KERNELS BUSY SPAN", in
microseconds.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_slm import pretrain

train = pretrain._pretrain
WAITS, PROFILE = 4, 5


def place() -> str:
    """Return the innermost function of ours or of Megatron's."""
    for frame in reversed(traceback.extract_stack()):
        if "/megatron_slm/" in frame.filename:
            return f"ours: {Path(frame.filename).name} {frame.name}"
        if "/megatron/" in frame.filename:
            return f"Megatron's: {Path(frame.filename).name} {frame.name}"
    return "elsewhere"


def count_waits(step: Any) -> Any:
    """Run a step, and print the synchronisations that CUDA tells of."""
    waits: Counter[str] = Counter()

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if "called a synchronizing" in str(message):  # not that this mode is a prototype
            waits[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for where, number in sorted(waits.items()):
        print(f"wait {number} {where}", flush=True)
    return result


def profile(step: Any) -> Any:
    """Run a step, and print how busy the device was, from its first kernel to its last."""
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as seen:
        result = step()
        torch.cuda.synchronize()
    # Annotations span kernels that are counted themselves.
    events = [
        e
        for e in seen.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    print(f"profile {len(events)} {sum(e.device_time for e in events):.0f} {span:.0f}", flush=True)
    print(seen.key_averages().table(sort_by="self_device_time_total", row_limit=25))
    return result


def train_watched(args: Any) -> None:
    from megatron_slm.training.step import SelectiveStep

    run, steps = SelectiveStep.run, 0

    def watched(self: SelectiveStep, schedule: Any, **given: Any) -> Any:
        nonlocal steps
        steps += not given.get("forward_only", False)
        how = {WAITS: count_waits, PROFILE: profile}.get(steps, lambda step: step())
        return how(lambda: run(self, schedule, **given))

    SelectiveStep.run = watched  # type: ignore[method-assign]
    train(args)


if __name__ == "__main__":
    pretrain._pretrain = train_watched
    pretrain.main()
