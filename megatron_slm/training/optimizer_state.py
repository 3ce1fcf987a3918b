"""Load the optimizer's state into a chain of optimizers other than the one that saved it.

Megatron gives experts an optimizer of their own where they have data-parallel groups of their own:
with an --expert-model-parallel-size above 1, or an --expert-tensor-parallel-size other than the
tensor-parallel size.  Its ChainedOptimizer keeps the states of two optimizers under their numbers,
and that of a single one as it is, and finds nothing where the other form has it.

Tensors go by their parameter's name in both forms, and are loaded.  What is left to bring over is
what a checkpoint has once for all ranks: the parameter groups, the step and the gradient scaler.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_slm.errors import UserError

OF_EXPERTS = "is_expert_parallel"


def wrap_load_state(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    """Wrap Megatron's `ChainedOptimizer.load_state_dict`: accept both forms."""

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, _in_own_form(self.chained_optimizers, state_dict))

    return load


def _in_own_form(optimizers: list[Any], state: Any) -> Any:
    """Return a loaded state in the form of these optimizers.

    Where the checkpoint has the other form, `state` has both: the tensors, and each optimizer's own
    numbers of its parameters, are in the form of `optimizers`, and all else in the checkpoint's.
    """
    if not isinstance(state, dict):
        return state
    numbered = {key: value for key, value in state.items() if isinstance(key, int)}
    whole = {key: value for key, value in state.items() if not isinstance(key, int)}
    if not numbered or not whole:
        return state
    if len(optimizers) == 1:
        own, saved = [whole], [numbered[number] for number in sorted(numbered)]
    else:  # a pipeline stage without experts may have nothing of its own for their optimizer
        own, saved = [numbered.get(number, {}) for number in range(len(optimizers))], [whole]
    groups = [group for each in saved for group in _with_groups(each)["param_groups"]]
    loaded = {}
    for number, (optimizer, part) in enumerate(zip(optimizers, own, strict=True)):
        common = copy.deepcopy(saved[0])
        needed = optimizer.optimizer.param_groups
        _with_groups(common)["param_groups"] = [_saved_group(group, groups) for group in needed]
        loaded[number] = merge(common, part)
    return loaded if len(optimizers) > 1 else loaded[0]


def _with_groups(state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an optimizer's state that has the parameter groups: all of it in float32,
    and the inner optimizer's where Megatron keeps other copies of the weights."""
    inner: dict[str, Any] = state.get("optimizer", state)
    return inner


def _saved_group(needed: dict[str, Any], saved: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved parameter group with the settings of `needed`, for experts or not as it is.

    Raises:
        UserError: there is none.
    """
    keys = [key for key in param_group_identifier_keys if key != OF_EXPERTS]
    for group in saved:
        if all(group.get(key) == needed.get(key) for key in keys):
            return {**copy.deepcopy(group), OF_EXPERTS: needed[OF_EXPERTS]}
    wanted = ", ".join(f"{key} {needed[key]}" for key in keys if needed.get(key) is not None)
    raise UserError(
        f"the checkpoint's optimizer has no parameters with {wanted}: give the options of the "
        "optimizer that the run had before, or start the optimizer afresh with --no-load-optim"
    )
