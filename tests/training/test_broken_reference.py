"""A reference that gives NaN ends the run, whatever Megatron itself checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs import GLOBAL_BATCH, VOCABULARY, Checkpoints, Corpus
from launch import pretrain
from megatron_slm.model.architecture import Architecture, to_hugging_face
from megatron_slm.model.import_hf import import_hugging_face
from megatron_slm.model.tensors import hugging_face_shapes


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One value of its last layer's norm is NaN."""
    shape = {"epsilon": 1e-5, "rope_theta": 10000, "rope_scaling": None, "window": None}
    a = Architecture(2, 64, 128, 4, 2, 16, VOCABULARY, 64, tied=False, **shape)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hugging_face(a, "float32")))
    tensors = {name: torch.randn(size) * 0.02 for name, size in hugging_face_shapes(a).items()}
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, source / "model.safetensors")
    import_hugging_face(source, tmp_path / "reference", 128)
    return tmp_path / "reference"


@pytest.mark.parametrize("checks", [[], ["--no-check-for-nan-in-loss-and-grad"]])
def test_nan(
    corpus: Corpus, untied: Checkpoints, broken: Path, tmp_path: Path, checks: list[str]
) -> None:
    """Also in the first step, in which Megatron lets NaN pass."""
    arguments = [
        *corpus.arguments,
        *untied.without_reference,
        *f"--slm-token-ratio 0.6 --slm-reference-load {broken} --train-iters 2".split(),
        *f"--micro-batch-size 3 --global-batch-size {GLOBAL_BATCH} --eval-iters 0".split(),
        *checks,
    ]
    run = pretrain(1, arguments, tmp_path / "run", check=False)
    assert run.codes == [2], run.outputs[0][-3000:]
    assert "losses of samples [0, 1, 2] of micro-batch 0 are NaN" in run.outputs[0]
    assert "iteration        1/" not in run.outputs[0]
