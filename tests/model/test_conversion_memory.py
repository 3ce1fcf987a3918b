"""A model of 1.1 billion parameters passes through in pieces."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from launch import SUPPORT, launch
from megatron_slm.model.conversion.tensors import hugging_face_shapes
from megatron_slm.model.hugging_face_config import from_hugging_face

TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LARGEST = 32000 * 2048 * 2
BOUND = 2 * LARGEST + 2**30


def random_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """bfloat16, each another part of the same noise."""
    shapes = hugging_face_shapes(from_hugging_face(TINYLLAMA, str(directory)))
    noise = torch.randint(-(2**15), 2**15, (LARGEST // 2 + 7 * len(shapes),), dtype=torch.int16)
    noise = noise.view(torch.bfloat16)
    return {
        name: noise[7 * i : 7 * i + torch.Size(shape).numel()].view(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def peak_of(command: list[str], directory: Path) -> int:
    """Bytes of memory that the tool had at most."""
    measured = str(SUPPORT / "peak_memory.py")
    run = launch(1, [measured, *command], directory)
    return int(re.findall(r"peak memory: (\d+) kB", run.outputs[0])[-1]) * 1024


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    source, megatron, back = (tmp_path / name for name in ("source", "megatron", "back"))
    source.mkdir()
    (source / "config.json").write_text(json.dumps(TINYLLAMA))
    tensors = random_tensors(source)
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_100_048_384
    try:
        file = source / "model.safetensors"
        save_file({k: v.clone() for k, v in tensors.items()}, file, metadata={"format": "pt"})
        into = ["import", "--hf", str(source), "--save", str(megatron)]
        assert peak_of(into, tmp_path / "import") < BOUND
        file.unlink()
        out = ["export", "--load", str(megatron), "--hf", str(back), "--like", str(source)]
        assert peak_of(out, tmp_path / "export") < BOUND
        with safe_open(back / "model.safetensors", framework="pt") as exported:
            assert set(exported.keys()) == set(tensors)
            for name, tensor in tensors.items():
                same = exported.get_tensor(name).view(torch.int16) == tensor.view(torch.int16)
                assert same.all(), name
    finally:
        for directory in (source, megatron, back):  # 4.4 GB
            shutil.rmtree(directory, ignore_errors=True)
