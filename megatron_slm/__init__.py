"""Selective Language Modeling (Rho-1, arXiv 2404.07965) for Megatron."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_slm.entry import use_device
    from megatron_slm.selective import SelectiveTraining, add_slm_arguments

__version__ = "0.1.0"
__all__ = ["SelectiveTraining", "add_slm_arguments", "use_device"]


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used.

    Importing this package must not import torch and Megatron: a command line is checked without
    them, and use_device() has to be called before Megatron is imported.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "entry" if name == "use_device" else "selective"
    return getattr(import_module(f"{__name__}.{module}"), name)
