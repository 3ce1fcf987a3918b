"""Let auxiliary losses weigh what they weigh in plain Megatron: those of experts, and the losses of
layers that predict more tokens, which count all valid tokens.

Megatron multiplies them by the tokens of the micro-batch, and divides all gradients by the tokens
that the loss counts.  In causal language modeling these are the valid ones, and the two cancel, for
experts but for masked tokens.  Here they are the selected ones, which would make the
auxiliary losses 1/k times too strong.  So they are scaled by selected / valid of the step.
For experts, whose losses count all tokens, those that the run leaves out are among the valid ones.

The factor is known before the first backward pass, since the number of selected tokens follows from
the loss masks.  The last pipeline stage, which has the masks, sends it to the others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_slm.selection import TokenSelector
from megatron_slm.training.command_line.experts import has_auxiliary_losses
from megatron_slm.training.micro_batch import MicroBatch
from megatron_slm.training.passes import as_selector_takes
from megatron_slm.training.settings import Step


def auxiliary_scale(
    args: Namespace, model: Sequence[torch.nn.Module], leaves_out: bool
) -> AuxiliaryScale | None:
    """Return the scale of a run's auxiliary losses; None if it has none.

    Args:
        args: Megatron's arguments.
        model: the policy's model chunks.
        leaves_out: whether the run leaves tokens out.
    """
    has_some = has_auxiliary_losses(args) or args.mtp_num_layers
    return AuxiliaryScale(model, leaves_out) if has_some else None


class AuxiliaryScale:
    """The scale of a run's auxiliary losses: Megatron's `moe_grad_scale_func` and
    `mtp_grad_scale_func`."""

    def __init__(self, model: Sequence[torch.nn.Module], leaves_out: bool) -> None:
        """Take the place of Megatron's own scale, which this one includes.

        Args:
            model: the policy's model chunks.
            leaves_out: whether the run leaves tokens out.
        """
        self.leaves_out = leaves_out
        self.shares: Tensor | tuple[float, float] = (1.0, 1.0)
        """The share of the step's valid tokens that is selected, and the same if tokens that are
        left out are among the valid ones."""
        self.config: Any = get_model_config(model[0])
        for chunk in model:
            config = get_model_config(chunk)
            config.mtp_grad_scale_func = partial(self._scale, 0)
            config.moe_grad_scale_func = partial(self._scale, 1)

    def _scale(self, which: int) -> Tensor:
        """Return the scale by which the backward pass multiplies auxiliary losses, float32 [1].

        Args:
            which: by which of the shares.
        """
        scale = torch.ones(1, device=torch.cuda.current_device())
        if self.config.grad_scale_func is not None:
            scale = self.config.grad_scale_func(scale)
        return scale * self.shares[which]

    def set_for(
        self, step: Step, micro_batches: list[MicroBatch], selector: TokenSelector, whole: bool
    ) -> None:
        """Set the scale of a step.  Collective over all ranks.

        Args:
            step: the step.
            micro_batches: all of its micro-batches.
            selector: selects its tokens.
            whole: whether it selects from all micro-batches at once.
        """
        if not (step.selects or self.leaves_out):
            self.shares = (1.0, 1.0)
            return
        if mpu.is_pipeline_last_stage():
            share = torch.ones((), device=torch.cuda.current_device())
            if step.selects:
                whole_step = as_selector_takes(micro_batches, step.ratio)
                share = selector.share_selected(*whole_step, whole)
            kept = _share_kept(micro_batches) if self.leaves_out else torch.ones_like(share)
            shares = torch.stack([share, share * kept])
        else:
            shares = torch.empty(2, device=torch.cuda.current_device())
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                shares,
                mpu.get_pipeline_model_parallel_last_rank(),
                group=mpu.get_pipeline_model_parallel_group(),
            )
        self.shares = shares


def _share_kept(micro_batches: list[MicroBatch]) -> Tensor:
    """Return which share of a step's tokens the run does not leave out, float32, 0-dim.

    Collective over the data- and context-parallel ranks.
    """
    kept = torch.stack([batch.valid.sum() for batch in micro_batches]).sum()
    out = [batch.left_out.sum() for batch in micro_batches if batch.left_out is not None]
    both = torch.stack([kept, kept + torch.stack(out).sum()])
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        torch.distributed.all_reduce(both, group=group)
    return (both[0] / both[1].clamp(min=1)).float()
