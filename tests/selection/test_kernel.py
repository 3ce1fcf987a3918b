"""The kernel that selects on a GPU: the plain form's bits, and few launches around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from launch import launch
from launches import Launches
from megatron_slm.selection import Ranks, SelectionSettings, TokenSelector, top_fraction

TRITON = "comes with torch's CUDA and ROCm builds"


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Ranks(distributed.group.WORLD, distributed.group.WORLD, 0, 1)
    distributed.destroy_process_group()


def test_the_kernel_selects_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason=TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    run = launch(1, ["-m", "kernel_as_plain"], tmp_path, fresh_threads=1)
    assert "the same bits" in run.outputs[0]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("one_set", [True, False])
def test_the_kernel_compiles(capability: int, one_set: bool) -> None:
    """To machine code of an A100 and an H100, which takes no GPU."""
    triton = pytest.importorskip("triton", reason=TRITON)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_slm.selection.top_fraction_triton import BLOCK, WARPS, select_kernel

    types = {"scores": "*i32", "valid": "*u8", "sets": "*i64", "units": "*i64", "selected": "*u8"}
    types |= {"threshold": "*i32", "counts": "*i64"}
    types |= {"tokens": "i32", "length": "i32", "number": "i32"}
    signature = {name: types.get(name, "constexpr") for name in select_kernel.arg_names}
    source = ASTSource(select_kernel, signature, constexprs={"ONE_SET": one_set, "BLOCK": BLOCK})
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": WARPS})
    assert made.asm["cubin"]


@pytest.mark.parametrize("scope", ["micro-batch", "sequence"])
def test_few_launches(scope: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel, in whose place the plain form stands here and counts as one."""
    plain = top_fraction.select_top_fraction
    launches = Launches()

    class Kernel:
        def select(self, scores: Tensor, valid: Tensor, units: Tensor, sets: Tensor) -> Any:
            monkeypatch.setattr(top_fraction, "triton_kernels", lambda *_: None)
            with torch.utils._python_dispatch._disable_current_modes():
                done = plain(scores, valid, [0.6] * len(units), sets)
            launches.names.append("select_kernel")
            return done.selected, done.threshold, done.valid, done.count

    monkeypatch.setattr(top_fraction, "triton_kernels", lambda *_: Kernel())
    scores, valid = torch.randn(4, 64), torch.rand(4, 64) > 0.1
    selector = TokenSelector(SelectionSettings(scope=scope), ranks)
    with launches:
        choice = selector.choose(scores, valid, 0.6)
    assert "select_kernel" in launches.names
    assert len(launches.names) <= 12, launches.names
    expected = selector.choose(scores, valid, 0.6)
    assert torch.equal(choice.selected, expected.selected)
    assert torch.equal(choice.threshold, expected.threshold)
