"""What a run that goes on must have in common with the run before."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_slm.errors import UserError
from megatron_slm.training.resumed import check_resumed

MATH, WEB = '[{"files": "abc", "iteration": "iter_0000010"}]', '[{"files": "def"}]'


def arguments(**changes: Any) -> Namespace:
    """Of a run that selects by a reference, on four ranks."""
    known = {
        "slm_selects": True,
        "slm_reference_identity": MATH,
        "slm_reference_ckpt_step": None,
        "slm_changed": [],
        "use_distributed_optimizer": True,
        "no_load_optim": False,
        "optimizer": "adam",
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
    }
    return Namespace(**known | changes)


def check(args: Namespace, saved: Namespace, kind: str = "dp_reshardable") -> None:
    content = {"distrib_optim_sharding_type": kind}
    check_resumed(args, {"args": saved, "content_metadata": content}, "--load X")


CLM: dict[str, Any] = {"slm_selects": False, "slm_reference_identity": None}
NONE: dict[str, Any] = {"slm_reference_identity": None}


def old(**values: Any) -> Namespace:
    """As version 0.1 saved it."""
    saved = arguments(**values)
    del saved.slm_selects
    return saved


@pytest.mark.parametrize(
    ("saved", "args", "message"),
    [
        (arguments(), arguments(**CLM), "--slm-changed selection"),
        (old(), arguments(**CLM), "--slm-changed selection"),
        (arguments(**NONE), arguments(**CLM), "--slm-changed selection"),  # random tokens
        (arguments(), arguments(**NONE), "this run has none: give the reference again"),
        (arguments(), arguments(slm_reference_identity=WEB), "so far, and now the reference is"),
        (
            arguments(),
            arguments(slm_reference_identity="ema:0.9"),
            "so far, and now the reference is",
        ),
    ],
)
def test_another_selection(saved: Namespace, args: Namespace, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(args, saved)
    changed = "selection" if "selection" in message else "reference"
    args.slm_changed = [changed]
    check(args, saved)


def test_the_same_selection() -> None:
    check(arguments(), arguments())
    check(arguments(), arguments(**CLM))  # selection begins
    check(arguments(), old(**NONE))
    check(arguments(**CLM), arguments(**CLM))
    # A later checkpoint of the reference, asked for.
    check(arguments(slm_reference_identity=WEB, slm_reference_ckpt_step=7), arguments())


@pytest.mark.parametrize(
    "size",
    [
        {"tensor_model_parallel_size": 1},
        {"pipeline_model_parallel_size": 4},
        {"virtual_pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 2},
        {"expert_tensor_parallel_size": 1},
    ],
)
def test_another_layout(size: dict[str, int]) -> None:
    with pytest.raises(UserError, match="without --dist-ckpt-optim-fully-reshardable"):
        check(arguments(**size), arguments())
    check(arguments(**size), arguments(), "fully_reshardable")
    check(arguments(no_load_optim=True, **size), arguments())
    check(arguments(**size), arguments(no_save_optim=True))
    check(arguments(use_distributed_optimizer=False, **size), arguments())


@pytest.mark.parametrize(
    "size", [{"expert_model_parallel_size": 2}, {"expert_tensor_parallel_size": 1}]
)
def test_experts_with_an_optimizer_in_parts(size: dict[str, int]) -> None:
    """Which parameters are in which part depends on the sizes."""
    muon = {"optimizer": "muon", "use_distributed_optimizer": False}
    said = "as --optimizer muon has them with --expert-model-parallel-size 1 and --expert-tensor-"
    with pytest.raises(UserError, match=f"{said}parallel-size 2: "):
        check(arguments(**muon, **size), arguments())
    check(arguments(**muon, **size), arguments(**size))
    check(arguments(**muon, **size, no_load_optim=True), arguments())
    check(arguments(use_distributed_optimizer=False, **size), arguments())
