"""End a run at a NaN: with one line, on all ranks, and without writing another checkpoint.

Left alone, Megatron repeats a step whose loss or gradients are NaN, saves weights that may be NaN
as well, and exits.  In the first step after a start it does not look, and the weights become NaN;
in validation it raises on the ranks concerned while the others wait for them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    RerunState,
    get_rerun_state_machine,
)
from megatron.training import get_args
from megatron.training.async_utils import maybe_finalize_async_save

from megatron_slm.errors import UserError
from megatron_slm.model.torch_dist import TRACKER, saved_iteration
from megatron_slm.training.settings import Step


def megatron_looks(step: Step) -> bool:
    """Return whether Megatron itself acts upon what is wrong with this step's losses."""
    return step.training and get_rerun_state_machine().first_iteration_complete


def check_step(step: Step) -> None:
    """Check a step's losses after its schedule has run.

    Collective over all ranks, except in steps that Megatron checks and finds well.

    Raises:
        UserError: losses or gradients are NaN or infinite, even after Megatron repeated the step.
    """
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    rerun = get_rerun_state_machine()
    when = f"iteration {step.iteration + 1}"
    if not step.training:
        _raise_together(step.faults[:1], f"validation after {when}")
    elif not rerun.first_iteration_complete:
        _raise_together(step.faults[:1], when)
    elif rerun.mode == RerunMode.VALIDATE_RESULTS and rerun.state == RerunState.RERUNNING_IN_PLACE:
        found = rerun.failed_validation_call if rerun.checkpoint_requested else None
        _raise_together([] if found is None else [found.caller.message], when)


def check_error(error: RuntimeError, step: Step) -> None:
    """Turn the error that Megatron raises for a NaN, as with --rerun-mode disabled, into one line.

    Raises:
        UserError: Megatron raised `error` for a NaN on this rank.  Other errors are left alone.
    """
    found = re.search(r"Unexpected result .*\(message='(.*)'\)", str(error))
    if found is not None:
        rank = torch.distributed.get_rank()
        message = _message(found[1], [rank], f"iteration {step.iteration + 1}")
        raise UserError(message) from error


def check_weights(model: list[torch.nn.Module], iteration: int) -> None:
    """Check the policy's weights before a checkpoint is written.  Collective over all ranks.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    finite = [parameter.isfinite().all() for chunk in model for parameter in chunk.parameters()]
    fault = [] if bool(torch.stack(finite).all()) else ["the policy's weights are NaN or infinite"]
    _raise_together(fault, f"the checkpoint of iteration {iteration}")


def _raise_together(found: list[str], when: str) -> None:
    """Raise a UserError on all ranks if one of them has found something."""
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, found)
    ranks = [rank for rank, of_rank in enumerate(of_ranks) if of_rank]
    if ranks:
        # A checkpoint that is still being written is from before the fault: complete it.
        maybe_finalize_async_save(blocking=True, terminate=True)
        raise UserError(_message(of_ranks[ranks[0]][0], ranks, when))


def _message(what: str, ranks: list[int], when: str) -> str:
    where = f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
    save = get_args().save
    last = None if save is None else saved_iteration(save)
    if last is None:
        kept = "no checkpoint has been written"
    else:
        kept = f"the last checkpoint, written before, is {last} (by {Path(save) / TRACKER})"
    return f"{when}, {where}: {what}; {kept}"
