"""A small Llama with random weights as a checkpoint to start from or to score by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_slm.model.architecture import Architecture
from megatron_slm.model.conversion.import_hf import import_hugging_face
from megatron_slm.model.conversion.tensors import hugging_face_shapes
from megatron_slm.model.hugging_face_config import to_hugging_face


def small_llama(vocabulary: int, positions: int) -> Architecture:
    """Two layers of hidden size 64, with two key-value groups."""
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    return Architecture(2, 64, 128, 4, 2, 16, vocabulary, positions, tied=False, **shape)


def save_llama(directory: Path, **sizes: int) -> Path:
    """Save a tiny Llama with random weights by transformers.

    Args:
        sizes: by transformers' names, where they are others.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**tiny | {"num_attention_heads": 2} | sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_random_llama(
    directory: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
) -> Path:
    """Write the Megatron checkpoint into a directory of its own.

    Args:
        change: made to the tensors, by Hugging Face's names.
    """
    source = directory / "hf"
    source.mkdir(parents=True)
    config = to_hugging_face(architecture, str(dtype).removeprefix("torch."))
    (source / "config.json").write_text(json.dumps(config))
    shapes = hugging_face_shapes(architecture)
    tensors = {name: torch.randn(size).mul(0.02).to(dtype) for name, size in shapes.items()}
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    import_hugging_face(source, directory / "megatron", 128)
    return directory / "megatron"
