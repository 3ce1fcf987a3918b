"""A reference that gives NaN, or that is not what its checkpoint says, ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Checkpoints, Corpus
from launch import pretrain
from megatron_slm.model.torch_dist import TorchDistReader
from random_llama import small_llama, write_random_llama


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One value of its last layer's norm is NaN."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = float("nan")

    return write_random_llama(tmp_path, small_llama(VOCABULARY, SEQUENCE), torch.float32, spoil)


def test_weights_that_its_arguments_do_not_ask_for(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """An output layer, of a model that is built as if it had none of its own."""
    reference = write_random_llama(tmp_path, small_llama(VOCABULARY, SEQUENCE), torch.float32)
    saved = TorchDistReader(reference / "release").common_state
    saved["args"].untie_embeddings_and_output_weights = False
    torch.save(saved, reference / "release" / "common.pt")
    arguments = [
        *corpus.arguments,
        *untied.without_reference,
        *f"--slm-token-ratio 0.6 --slm-reference-load {reference} --train-iters 1".split(),
        *f"--micro-batch-size 3 --global-batch-size {GLOBAL_BATCH} --eval-iters 0".split(),
    ]
    run = pretrain(1, arguments, tmp_path / "run", check=False)
    assert run.codes == [2], run.outputs[0][-3000:]
    assert "has output_layer.weight, which is not what its arguments describe" in run.outputs[0]


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
