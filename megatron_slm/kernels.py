"""Import modules of Triton kernels, and try each one out before anything relies on it.

Triton compiles a kernel when it is first called, with ptxas and the machine's C compiler.  Where
one of these is missing or too old, that call fails.  It should fail at the start rather than in the
middle of a step, and need not end the run, since every kernel has a plain form in torch.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


@cache
def triton_kernels(name: str, device: torch.device) -> ModuleType | None:
    """Import a module of kernels and run its `try_out(device)`, which calls every kernel.

    Args:
        name: the module's name.
        device: where the kernels are to run.

    Returns:
        The module; None without a GPU or without Triton, which comes with torch's CUDA and ROCm
        builds, and after a warning if Triton cannot compile.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        module = import_module(name)
        module.try_out(device)
    except Exception as error:
        if os.getenv("LOCAL_RANK", "0") == "0":
            why = next(iter(str(error).splitlines()), type(error).__name__)
            print(
                f"WARNING: Triton cannot compile {name} here ({why}); its plain form in torch is "
                "used, which is slower. Triton needs a C compiler and Python's headers",
                flush=True,
            )
        return None
    return module
