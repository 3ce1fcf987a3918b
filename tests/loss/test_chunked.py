"""Losses and gradients in chunks are those of torch's cross entropy, on one rank and several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from launch import launch
from megatron_slm.kernels import triton_kernels
from megatron_slm.loss import chunked, softmax
from megatron_slm.loss.weight_gradient import WeightGradient, add_product


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tensor_parallel_ranks(ranks: int, tmp_path: Path) -> None:
    run = launch(ranks, ["-m", "head_ranks", "softmax"], tmp_path)
    assert all("agreed" in output for output in run.outputs)


def test_triton_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks of the GPU's kernels, in Triton's interpreter."""
    pytest.importorskip("triton", reason="comes with torch's CUDA and ROCm builds")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    run = launch(1, ["-m", "head_ranks", "softmax_triton"], tmp_path, fresh_threads=1)
    assert all("agreed" in output for output in run.outputs)


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile(capability: int) -> None:
    """To machine code of an A100 and an H100, which takes no GPU."""
    triton = pytest.importorskip("triton", reason="comes with torch's CUDA and ROCm builds")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_slm.loss.softmax_triton import BLOCK, add_chunk_kernel, logits_gradient_kernel

    pointers = {"labels": "*i64", "maximum": "*fp32", "sums": "*fp32", "sum_exp": "*fp32"}
    pointers |= {"scale": "*fp32", "logits": "*bf16"}
    pointers |= {"rows": "i32", "columns": "i32", "first": "i32"}
    for kernel, constants in (
        (add_chunk_kernel, {"ENTROPIES": True, "BLOCK": BLOCK}),
        (logits_gradient_kernel, {"BLOCK": BLOCK}),
    ):
        signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built for CPUs alone")
def test_products_are_added_in_one_kernel() -> None:
    """On a GPU a bfloat16 product goes into a float32 sum without being written itself."""
    called: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(function)
            try:
                return function(*args, **(kwargs or {}))
            except TypeError:  # torch 2.11 cannot tell the shape of this one without a GPU
                return kwargs["out"]

    with FakeTensorMode():
        left, right, total, main_grad = (
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((6, 8), torch.bfloat16),
                ((8, 4), torch.bfloat16),
                ((6, 4), torch.float32),
                ((8, 8), torch.float32),
            )
        )
        main_grad.main_grad, main_grad.requires_grad = torch.empty_like(main_grad), True
        with Watch():
            add_product(total, left, right)
            WeightGradient(main_grad, True).set(slice(0, 8), left, left)
    products = [one for one in called if "addmm" in str(one) or one == torch.ops.aten.mm.default]
    assert products == [torch.ops.aten.addmm.dtype_out] * 2
    assert not [one for one in called if one == torch.ops.aten.add_.Tensor]


def test_the_plain_form_where_triton_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As here, where it finds no driver: said in a line, once, and no step fails."""
    pytest.importorskip("triton", reason="comes with torch's CUDA and ROCm builds")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, for which it compiles")
    device = torch.device("cuda", 0)
    triton_kernels.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):
        assert chunked.softmax_functions(device) is softmax
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: Triton cannot compile megatron_slm.loss.softmax_triton here (")
    triton_kernels.cache_clear()
    assert chunked.softmax_functions(torch.device("cpu")) is softmax
    assert not capsys.readouterr().out


def test_no_logits_of_all_tokens(
    group: distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor of head and loss, forward and backward, is a chunk of logits."""
    rows, hidden_size, vocabulary, columns = 1024, 8, 512, 64
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 4 * rows * columns})
    monkeypatch.setattr(chunked, "MIN_COLUMNS", 1)
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        scored = chunked.token_losses(hidden.detach(), weight.detach(), labels, group)
        index = torch.arange(0, rows, 2)
        loss = chunked.selected_loss(
            hidden, weight, labels, scored, index, group, reduce_hidden_gradient=False
        )
        loss.backward()
    assert largest == rows * columns
    expected = cross_entropy(hidden @ weight.t(), labels, reduction="none")[index].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1 << 22), (4096, 1024), (5000, 1024)])
def test_chunks_are_of_a_size(rows: int, columns: int) -> None:
    """16 MiB, unless that would make products too narrow."""
    assert chunked.chunk_columns(rows, "cpu") == columns


def test_large_logits(group: distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond what exp can take, with maxima anywhere in the vocabulary."""
    monkeypatch.setattr(chunked, "MIN_COLUMNS", 5)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 0})
    torch.manual_seed(1)
    hidden, weight = 30.0 * torch.randn(64, 24), torch.randn(47, 24)
    logits = hidden.double() @ weight.double().t()
    assert logits.amax() > 200 and logits.argmax(-1).unique().numel() > 10
    labels = torch.randint(0, 47, (64,))
    scored = chunked.token_losses(hidden, weight, labels, group, entropies=True)
    expected = cross_entropy(logits, labels, reduction="none").float()
    torch.testing.assert_close(scored.losses, expected, rtol=1e-5, atol=1e-4)
    probability = logits.softmax(-1)
    entropies = torch.special.entr(probability).sum(-1).float()
    assert scored.entropies is not None
    torch.testing.assert_close(scored.entropies, entropies, rtol=1e-3, atol=1e-5)


def test_nan_is_not_hidden(group: distributed.ProcessGroup) -> None:
    """A NaN in a row's hidden state makes that row's loss NaN, and no other's."""
    hidden, weight = torch.randn(5, 8), torch.randn(16, 8)
    hidden[3, 2] = torch.nan
    losses = chunked.token_losses(hidden, weight, torch.arange(5), group).losses
    assert losses.isnan().tolist() == [False, False, False, True, False]
