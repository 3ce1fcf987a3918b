"""Operations that would launch a kernel on a GPU, counted on a CPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

# What only looks at a tensor another way, or asks for memory, launches nothing.
NO_KERNELS = ("view", "select", "slice", "unsqueeze", "squeeze", "expand", "empty", "unbind", "t.")


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel on a GPU: one or more each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(function).removeprefix("aten.")
        if not name.startswith(NO_KERNELS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
