"""The optimizer's state in the form of the optimizers that load it.

tests/distributed/test_experts.py resumes runs; here are states that its machines do not have.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_slm.errors import UserError
from megatron_slm.training.optimizer_state import wrap_load_state


def groups(experts: bool, rate: float = 0.1) -> list[dict[str, Any]]:
    return [
        {"wd_mult": decay, "is_expert_parallel": experts, "max_lr": rate} for decay in (1.0, 0.0)
    ]


def load(of_optimizers: list[list[dict[str, Any]]], state: dict[Any, Any]) -> Any:
    """Return what Megatron's function is given, for optimizers with these parameter groups."""
    chain = [Namespace(optimizer=Namespace(param_groups=needed)) for needed in of_optimizers]
    loaded = []
    own = wrap_load_state(lambda self, state_dict: loaded.append(state_dict))
    own(Namespace(chained_optimizers=chain), state)
    return loaded[0]


def test_a_pipeline_stage_without_experts() -> None:
    """Of the experts' optimizer, such a stage reads no tensors from a checkpoint of one."""
    saved = [group | {"step": 7} for group in groups(experts=False)]
    state = {"optimizer": {"param_groups": saved}, 0: {"param_state": {0: "tensors"}}}
    loaded = load([groups(experts=False), groups(experts=True)], state)
    of_experts = [group | {"step": 7} for group in groups(experts=True)]
    assert loaded == {
        0: {"optimizer": {"param_groups": saved}, "param_state": {0: "tensors"}},
        1: {"optimizer": {"param_groups": of_experts}},
    }


def test_parameter_groups_that_the_checkpoint_lacks() -> None:
    state = {"param_groups": groups(experts=False), 0: {}, 1: {}}
    with pytest.raises(UserError, match=r"no parameters with max_lr 0.2, wd_mult 1.0: give the"):
        load([groups(experts=False, rate=0.2), groups(experts=True)], state)
