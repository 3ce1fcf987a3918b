"""In the place of Transformer Engine: what its modules keep in a state dict, and nothing else.

From its source, as of 2.9: parameters and extra state (get_extra_state in module/base.py and
ops/op.py: an empty tensor without fp8) of the modules that Megatron's layers are made of.
Everything else that Megatron imports is an empty class here.  Layers, names and sharding are
Megatron's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module, Parameter

NAME = "transformer_engine"


class WithExtraState(Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0


class Linear(WithExtraState):
    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(out_features, in_features))


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features)
        self.layer_norm_weight = Parameter(torch.empty(in_features))


class RMSNorm(WithExtraState):
    def __init__(self, normalized_shape: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(normalized_shape))


class DotProductAttention(WithExtraState):
    """It has a hook of its own that forgives a state dict without its extra state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

        def forgive(module: Module, incompatible: Any) -> None:
            for key in list(incompatible.missing_keys):
                if "core_attention._extra_state" in key:
                    incompatible.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(forgive)


KEPT = {one.__name__: one for one in (Linear, LayerNormLinear, RMSNorm, DotProductAttention)}


class Empty(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "2.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get_cpu_offload_context":
            return lambda *args: (None, None)
        if name.islower():  # te.pytorch, te.common.recipe
            return __import__(f"{self.__name__}.{name}", fromlist=["*"])
        return KEPT.get(name) or type(name, (Module,), {})


class Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        own = name == NAME or name.startswith(f"{NAME}.")
        return ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Before Megatron is imported."""
    sys.meta_path.insert(0, Finder())
