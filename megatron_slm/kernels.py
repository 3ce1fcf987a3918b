"""Modules of Triton kernels, each tried out once before anything relies on it.

Triton compiles a kernel at its first call, with ptxas and the machine's C compiler.  Where one of
them is missing or too old, that call fails: better at the start than in the middle of a step, and
no reason to stop, since every kernel has a plain form in torch.
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
    """Import a module of kernels and run its `try_out`; None where there is no GPU, no Triton (it
    comes with torch's CUDA and ROCm builds), or none that can compile, which is said in a line.

    Args:
        name: of the module, which has try_out(device): it calls every kernel.
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
