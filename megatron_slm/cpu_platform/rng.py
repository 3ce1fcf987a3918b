"""Provide the CUDA generator on the CPU, and initial weights that do not depend on the layout.

On a GPU, Megatron draws dropout from the CUDA generator, which its RNG tracker forks for tensor
parallelism, and, under `--use-cpu-initialization`, initial weights from the CPU generator.  If both
were one generator, seeding one would disturb the other, and each tensor-parallel size would start
from different weights.  Here a second CPU generator stands in for CUDA's.

Megatron seeds the CPU generator with seed + 100 * pipeline rank and draws all weights of a stage
from it in turn, so weights depend on how layers are spread over stages.  Here every transformer
layer, the embedding and the output layer draw from a generator seeded by (seed, its own name), and
so does every expert of a layer.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

cuda_generator = torch.Generator(device="cpu")
_state: dict[str, Any] = {"seed": 1234, "inside": "", "expert": 0}


def install() -> None:
    """Replace the CUDA generator, dropout and initialization.  Called once, by the package."""
    _install_generator()
    _install_dropout()
    _install_layerwise_initialization()


def _install_generator() -> None:
    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return cuda_generator.get_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        cuda_generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        cuda_generator.manual_seed(seed)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = manual_seed
        module.manual_seed_all = manual_seed
    torch.cuda.default_generators = (cuda_generator,)

    # These call torch's C++ bindings directly, and not the functions replaced above.
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _install_dropout() -> None:
    @functools.wraps(torch.nn.functional.dropout)
    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return input
        keep = torch.empty(input.shape, dtype=torch.float32)
        keep.bernoulli_(1.0 - p, generator=cuda_generator)
        scaled = (keep / (1.0 - p)).to(input.dtype)
        return input.mul_(scaled) if inplace else input * scaled

    torch.nn.functional.dropout = dropout


@contextmanager
def _stream(name: str) -> Iterator[None]:
    """Draw from a CPU generator seeded by (seed, name) in the block; within another such block,
    from that block's generator."""
    if _state["inside"]:
        yield
        return
    _state["inside"] = name
    try:
        with _seeded(name):
            yield
    finally:
        _state["inside"] = ""


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((_state["seed"] << 32) + zlib.crc32(name.encode()))
        yield


def _install_layerwise_initialization() -> None:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        get_transformer_layer_offset,
    )
    from megatron.training import initialize

    def layer_name(**kwargs: Any) -> str:
        # The constructor receives the number within the stage, and adds the stage's offset itself,
        # unless the model is a hybrid one or the layer predicts more tokens.
        number = kwargs["layer_number"]
        if kwargs.get("is_mtp_layer"):
            return f"mtp layer {number}"
        if kwargs.get("add_layer_offset", True):
            number += get_transformer_layer_offset(kwargs["config"], kwargs["vp_stage"])
        return f"layer {number}"

    _draw_from_stream(TransformerLayer, layer_name)
    _draw_from_stream(VocabParallelEmbedding, lambda **kwargs: "embedding")
    # Within a transformer layer the layer's stream is open already; the only column-parallel layer
    # outside of them is the output layer.
    _draw_from_stream(ColumnParallelLinear, lambda **kwargs: "output_layer")
    _install_experts()

    set_random_seed = initialize._set_random_seed

    @functools.wraps(set_random_seed)
    def remember_seed(seed: int, *args: Any, **kwargs: Any) -> None:
        _state["seed"] = seed
        set_random_seed(seed, *args, **kwargs)

    initialize._set_random_seed = remember_seed


def _install_experts() -> None:
    """Make an expert's weights depend on its number in the layer, and not on the ranks."""
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.moe.experts import SequentialMLP

    construct_all, construct_one = SequentialMLP.__init__, MLP.__init__

    @functools.wraps(construct_all)
    def count_from_first(self: Any, own: int, *args: Any, **kwargs: Any) -> None:
        _state["expert"] = kwargs["pg_collection"].ep.rank() * own
        construct_all(self, own, *args, **kwargs)

    @functools.wraps(construct_one)
    def construct_expert(self: Any, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("is_expert"):
            construct_one(self, *args, **kwargs)
            return
        with _seeded(f"{_state['inside']} expert {_state['expert']}"):
            construct_one(self, *args, **kwargs)
        _state["expert"] += 1

    SequentialMLP.__init__ = count_from_first
    MLP.__init__ = construct_expert


def _draw_from_stream(module: type[torch.nn.Module], name: Callable[..., str]) -> None:
    """Make a module's constructor draw from a stream, named by its keyword arguments."""
    construct = module.__init__

    @functools.wraps(construct)
    def construct_from_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        with _stream(name(**kwargs)):
            construct(self, *args, **kwargs)

    module.__init__ = construct_from_stream
