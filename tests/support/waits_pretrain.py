"""megatron_slm.pretrain, which prints where training steps make the host wait for a GPU.

On a CPU nothing waits, so what would is recognised: values asked for, tensors of a size that only
the device knows, copies from host memory that is not pinned, synchronisation.  The first step, in
which things are built, is passed over.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm import pretrain

OURS = str(Path(pretrain.__file__).parent)
PLATFORM = f"{OURS}/cpu_platform"
ASKED = {
    torch.ops.aten._local_scalar_dense.default: "value",
    torch.ops.aten.equal.default: "value",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "masked_select",
    torch.ops.aten._unique2.default: "unique",
    torch.ops.aten.repeat_interleave.Tensor: "repeat_interleave",
}
train = pretrain._pretrain


class Waits(TorchDispatchMode):
    """Counts waits by kind and by the function that makes them, ours or Megatron's."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.megatrons: Counter[str] = Counter()

    def note(self, kind: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(OURS) and not name.startswith(PLATFORM):
                self.ours[f"{Path(name).name} {frame.f_code.co_name}: {kind}"] += 1
                return
            if "/megatron/" in name:
                self.megatrons[f"{Path(name).name} {frame.f_code.co_name}: {kind}"] += 1
                return
            frame = frame.f_back

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function in ASKED:
            self.note(ASKED[function])
        if "index" in str(function):
            indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
            if any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices):
                self.note("index by a mask")
        return function(*args, **(kwargs or {}))


def names_a_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = (*args[:1], kwargs.get("device"))
    return any(isinstance(one, torch.device) or one == "cuda" for one in given if one is not None)


@contextmanager
def patched(waits: Waits) -> Any:
    """Record what dispatch does not show: values read at once, and copies from CPU to CPU."""
    from megatron_slm.training import micro_batch

    originals: list[tuple[Any, str, Callable[..., Any]]] = []

    def watch(owner: Any, name: str, when: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if when(args, kwargs):
                waits.note(name)
            return original(*args, **kwargs)

        originals.append((owner, name, original))
        setattr(owner, name, watched)

    for name in ("tolist", "numpy", "cpu"):
        watch(Tensor, name, lambda args, kwargs: True)
    placed = set()

    def waits_for_copy(args: Any, kwargs: Any) -> bool:
        placed.add(args[0].data_ptr())
        return not kwargs.get("non_blocking")

    watch(Tensor, "cuda", waits_for_copy)
    # Megatron copies it to the device if it is not there, and waits.
    told = "update_seqlen_stats_from_cu_seqlens"
    watch(micro_batch, told, lambda args, kwargs: args[0].data_ptr() not in placed)
    watch(
        Tensor,
        "to",
        lambda args, kwargs: names_a_device(args[1:], kwargs) and not kwargs.get("non_blocking"),
    )
    for name in ("tensor", "as_tensor"):
        watch(torch, name, lambda args, kwargs: kwargs.get("device") is not None)
    watch(torch.cuda, "synchronize", lambda args, kwargs: True)
    watch(torch.cuda.Event, "synchronize", lambda args, kwargs: True)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def train_watched(args: Namespace) -> None:
    from megatron_slm.training.step import SelectiveStep

    run, waits, steps = SelectiveStep.run, Waits(), 0

    def watched(self: SelectiveStep, schedule: Any, **given: Any) -> Any:
        nonlocal steps
        if self.step is None or given.get("forward_only"):
            return run(self, schedule, **given)
        steps += 1
        with waits, patched(waits):
            return run(self, schedule, **given)

    SelectiveStep.run = watched  # type: ignore[method-assign]
    train(args)
    print("steps", steps)
    for whose, counted in (("ours", waits.ours), ("megatrons", waits.megatrons)):
        for where, number in sorted(counted.items()):
            print(f"wait of {whose}: {number / steps:g} {where}")


if __name__ == "__main__":
    pretrain._pretrain = train_watched
    pretrain.main()
