"""The loss of one micro-batch as Megatron's schedules want it, and what it reports.

Training maximises nothing but the log-likelihood of the selected tokens (paper, eq. 3-5):

    excess = policy loss - reference loss       per token, no gradient
    selected = top k% of the excess             over the valid tokens of the micro-batch
    loss = sum of the policy loss over selected / number selected over the global batch

The schedule is given sum and number; Megatron's per-token-loss path adds both up over micro-batches
and data- and context-parallel ranks, and divides once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

from megatron_slm.selection import Selection, select_in_micro_batch
from megatron_slm.training.micro_batch import MicroBatch

# Megatron's own definition of a spiky loss: this many times the largest loss so far.
SPIKY_LOSS_FACTOR = 10


@dataclass(frozen=True)
class SelectiveSettings:
    """token_ratio: k, the part of the valid tokens that is trained on, in (0, 1].
    selective: whether there are reference losses to select by; otherwise all valid tokens count.
    head: how the policy's output layer and loss are computed (loss/chunked.py compares the two).
    """

    token_ratio: float
    selective: bool
    head: Literal["dense", "chunked"]


class MicroBatchObjective:
    """Selects tokens when the policy's losses are known; called by the schedule for the loss."""

    def __init__(
        self, micro_batch: MicroBatch, settings: SelectiveSettings, training: bool
    ) -> None:
        self.micro_batch = micro_batch
        self.settings = settings
        self.training = training
        self.losses: Tensor | None = None
        self.scores: Tensor | None = None
        self.selection: Selection | None = None

    def select(self, losses: Tensor) -> Tensor:
        """Selected tokens, bool [b, s/c], given the policy's losses, float32 [b, s/c]."""
        batch = self.micro_batch
        assert batch.loss_mask is not None
        valid = batch.loss_mask > 0
        self.losses = losses
        if not self.settings.selective:
            return valid
        assert batch.reference_losses is not None
        self.scores = losses - batch.reference_losses
        self.selection = select_in_micro_batch(
            self.scores, valid, self.settings.token_ratio, mpu.get_context_parallel_group()
        )
        return self.selection.selected

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss function.

        Args:
            output: losses of all tokens, [b, s/c], from Megatron's output layer (the dense head),
                or the sum of the selected tokens' losses, 0-dim (the chunked head).

        Returns:
            The sum of the losses to train on, their number (int32, 0-dim), and a report of
            [sum, count] pairs, which Megatron adds up and divides.
        """
        loss_mask = self.micro_batch.loss_mask
        assert loss_mask is not None
        if self.settings.head == "dense":
            selected = self.select(_same_on_tensor_parallel_ranks(output.detach().float()))
            mask = selected.float() if self.settings.selective else loss_mask
            # As Megatron's own loss function, so that with k = 100% not a bit differs.
            loss = torch.sum(output.view(-1).float() * mask.view(-1).float())
            count = mask.sum().to(torch.int)
        else:
            loss = output
            count = self._count_selected()
        self._check(loss)
        return loss, count, self._report(loss, count)

    def _count_selected(self) -> Tensor:
        assert self.micro_batch.loss_mask is not None
        selected = (
            self.selection.selected if self.selection is not None else self.micro_batch.loss_mask
        )
        return selected.sum().to(torch.int)

    def _report(self, loss: Tensor, count: Tensor) -> dict[str, Tensor]:
        if self.selection is None:
            return {"lm loss": torch.stack([loss.detach().clone(), count.float()])}
        assert self.losses is not None and self.scores is not None
        batch = self.micro_batch
        assert batch.loss_mask is not None and batch.reference_losses is not None
        valid = batch.loss_mask > 0
        selected = self.selection.selected
        any_selected = (self.selection.count > 0).float()
        all_tokens = _pair(self.losses, valid)
        report = {
            # In validation lm loss means what it means in every Megatron run: all tokens.
            "lm loss": torch.stack([loss.detach().clone(), count.float()])
            if self.training
            else all_tokens,
            "selected loss": _pair(self.losses, selected),
            "unselected loss": _pair(self.losses, valid & ~selected),
            "all-token loss": all_tokens,
            "reference loss": _pair(batch.reference_losses, valid),
            "excess loss": _pair(self.scores, valid),
            "selected ratio": torch.stack([selected.sum().float(), valid.sum().float()]),
            # Averaged over micro-batches; of one without valid tokens there is none.
            "threshold": torch.stack(
                [torch.where(any_selected > 0, self.selection.threshold, 0.0), any_selected]
            ),
        }
        return {name: _nonzero_denominator(pair) for name, pair in report.items()}

    def _check(self, loss: Tensor) -> None:
        """Megatron's checks of a loss, and none of the scores may be NaN."""
        args = get_args()
        rerun = get_rerun_state_machine()
        validate = partial(rerun.validate_result, result=loss, tolerance=0.0)
        if args.check_for_nan_in_loss_and_grad:
            if self.scores is not None:
                assert self.micro_batch.loss_mask is not None
                nan = self.scores.isnan() & (self.micro_batch.loss_mask > 0)
                samples = nan.any(1).nonzero().flatten().tolist()
                validate(
                    rejection_func=lambda _: bool(samples),
                    message=f"found NaN in the excess loss of samples {samples} of micro-batch "
                    f"{self.micro_batch.number}",
                    fatal=True,
                )
            for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                validate(
                    rejection_func=test,
                    message=f"found {name} in local forward loss calculation",
                    fatal=True,
                )
        if args.check_for_spiky_loss:
            validate(
                rejection_func=partial(
                    rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
                ),
                message="Spiky loss",
                fatal=False,
            )


def _pair(values: Tensor, where: Tensor) -> Tensor:
    """[sum, count] of the values at `where`, float32."""
    return torch.stack([torch.where(where, values, 0.0).sum(), where.sum().float()])


def _nonzero_denominator(pair: Tensor) -> Tensor:
    """So that the mean over no token is 0: a NaN would spoil the average of a whole log interval.
    Too small to change any count."""
    return torch.stack([pair[0], pair[1].clamp(min=1e-30)])


def _same_on_tensor_parallel_ranks(losses: Tensor) -> Tensor:
    """Ranks that disagreed on a bit would train on different tokens."""
    group = mpu.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.broadcast(losses, group=group, group_src=0)
    return losses
