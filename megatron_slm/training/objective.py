"""The loss of one micro-batch as Megatron's schedules want it, and what it reports.

Training maximises nothing but the log-likelihood of the selected tokens (Rho-1, eq. 3-5):

    excess = policy loss - reference loss       per token, no gradient (or another score), both
                                                without the vocabulary's padding in their softmax
    selected = top k% of the excess             over the valid tokens of the micro-batch (or scope)
    loss = sum of the policy loss over selected / number selected over the global batch, by
           Megatron's softmax, which has the padding

The schedule is given sum and number; Megatron's per-token-loss path adds both up over micro-batches
and data- and context-parallel ranks, and divides once.

The host waits for the device once a micro-batch, to hear whether anything is NaN or infinite: that
is Megatron's own check of a loss, for which plain Megatron waits twice.  With the chunked head it
waits a second time where only the device knows how many tokens count (TokenSelector.most_selected),
and with --sft, whose masked prompts would be computed for nothing.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.loss import same_on_ranks
from megatron_slm.selection import (
    Choice,
    TokenSelector,
    context_parallel_part,
    random_scores,
    token_scores,
)
from megatron_slm.training.loss_report import report_of
from megatron_slm.training.micro_batch import MicroBatch
from megatron_slm.training.nan import megatron_looks
from megatron_slm.training.settings import SelectiveSettings, Step

# Megatron's own definition of a spiky loss: this many times the largest loss so far.
SPIKY_LOSS_FACTOR = 10
# What is looked for in each micro-batch, as errors call it.
FAULTS = ("NaN in the loss", "Inf in the loss", "NaN in the token scores")


class MicroBatchObjective:
    """Selects tokens when the policy's losses are known; called by the schedule for the loss.

    losses: of all tokens, by a softmax without padding, which they are scored by.
    trained: the same by Megatron's softmax, which has it.
    """

    def __init__(
        self,
        micro_batch: MicroBatch,
        settings: SelectiveSettings,
        step: Step,
        selector: TokenSelector,
    ) -> None:
        self.micro_batch = micro_batch
        self.settings = settings
        self.step = step
        self.selector = selector
        self.losses: Tensor | None = None
        self.trained: Tensor | None = None
        self.choice: Choice | None = None

    @property
    def most_counted(self) -> int | None:
        """How many tokens count at most; None where that is not known without asking the device, or
        where it would be many more than do."""
        if get_args().sft:
            return None
        assert self.micro_batch.labels is not None
        samples, length = self.micro_batch.labels.shape
        if not self.step.selects:
            return samples * length
        return self.selector.most_selected(samples, length, self.step.ratio)

    def tell(self, losses: Tensor) -> None:
        """Hear the dense head's losses without padding before the model returns those with it."""
        self.losses = losses

    def weigh(
        self, losses: Tensor, entropies: Tensor | None = None, trained: Tensor | None = None
    ) -> Tensor:
        """How much each token counts, given the policy's losses (entropies, if the score needs
        them, and the losses to train on), float32 [b, s/c]: its weight, float32, or whether it is
        selected, bool."""
        batch = self.micro_batch
        self.losses, self.trained = losses, trained
        if not self.step.selects:
            return batch.valid
        scores = self.score(losses, entropies)
        self.choice = batch.choice or self._choose(batch, scores)
        return self.choice.selected if self.choice.weights is None else self.choice.weights

    def score(self, losses: Tensor, entropies: Tensor | None) -> Tensor:
        """Set and return what tokens are ranked by, given the policy's losses and entropies."""
        batch = self.micro_batch
        batch.scores = token_scores(
            self.settings.selection.score,
            losses,
            entropies,
            batch.reference_losses,
            batch.reference_entropies,
            lambda: self._draw(losses),
        )
        return batch.scores

    def _draw(self, losses: Tensor) -> Tensor:
        """Return random scores for the tokens of these losses; no layout changes them."""
        samples, length = losses.shape
        number, size = self.micro_batch.number, mpu.get_context_parallel_world_size()
        first = number * mpu.get_data_parallel_world_size() + mpu.get_data_parallel_rank()
        numbers = torch.arange(samples) + first * samples
        seed, iteration = self.settings.seed, self.step.iteration
        whole = random_scores(seed, iteration, numbers, length * size, losses.device)
        if size == 1:
            return whole
        return context_parallel_part(whole, mpu.get_context_parallel_rank(), size)

    def _choose(self, batch: MicroBatch, scores: Tensor) -> Choice:
        if self.step.thresholds is not None:
            thresholds = self.step.thresholds
            return self.selector.choose_above(scores, batch.valid, thresholds, batch.domains)
        return self.selector.choose(scores, batch.valid, self.step.ratio, batch.domains)

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's loss function.

        Args:
            output: losses of all tokens, [b, s/c], from Megatron's output layer (the dense head),
                or the weighted sum of the selected tokens' losses, 0-dim (the chunked head).

        Returns:
            The sum of the losses to train on, their number (int32, 0-dim), and a report of
            [sum, count] pairs, which Megatron adds up and divides.
        """
        loss_mask = self.micro_batch.loss_mask
        assert loss_mask is not None
        if self.settings.head == "dense":
            mask = loss_mask
            if self.step.selects:
                trained = same_on_ranks(
                    output.detach().float(), mpu.get_tensor_model_parallel_group()
                )
                mask = self.weigh(trained if self.losses is None else self.losses, None, trained)
            # As Megatron's own loss function, so that with k = 100% not a bit differs.
            loss = torch.sum(output.view(-1).float() * mask.view(-1).float())
        else:
            loss = output
        counted = loss_mask if self.choice is None else self.choice.selected
        count = counted.sum().to(torch.int)
        self._check(loss)
        return loss, count, self._report(loss, count)

    def _report(self, loss: Tensor, count: Tensor) -> dict[str, Tensor]:
        if self.choice is None:
            return {"lm loss": torch.stack([loss.detach().clone(), count.float()])}
        assert self.losses is not None and self.trained is not None
        return report_of(
            self.micro_batch,
            self.choice,
            loss.detach(),
            losses=self.losses,
            trained=self.trained,
            domains=self.settings.domains,
            # In validation lm loss means what it means in every Megatron run: all tokens.
            of_all=not self.step.training,
        )

    def _check(self, loss: Tensor) -> None:
        """Megatron's checks of a loss, and none of the scores may be NaN.

        Raises:
            UserError: the reference overflows, which no loss scale mends and Megatron, which checks
                nothing under fp16, would not see.
        """
        args = get_args()
        batch = self.micro_batch
        read = cache(self._faults(loss).tolist)  # once for all checks: here the host waits

        def found(number: int) -> bool:
            flags = read()
            if flags[-1] and len(flags) > len(FAULTS):
                self._refuse_reference()
            return number < len(flags) and bool(flags[number])

        rerun = get_rerun_state_machine()
        validate = partial(rerun.validate_result, result=loss, tolerance=0.0)
        if args.check_for_nan_in_loss_and_grad:
            for number, what in enumerate(FAULTS):
                message = f"found {what} of micro-batch {batch.number}"
                if megatron_looks(self.step):
                    validate(rejection_func=lambda _, it=number: found(it), message=message)
                elif found(number):
                    self.step.faults.append(message)
        elif batch.scores is not None and batch.reference_losses is not None:
            found(0)
        if args.check_for_spiky_loss:
            validate(
                rejection_func=partial(
                    rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
                ),
                message="Spiky loss",
                fatal=False,
            )

    def _faults(self, loss: Tensor) -> Tensor:
        """Whether each of FAULTS is there, and the last: whether the reference's losses are NaN; as
        far as there are scores and a reference, bool [2, 3 or 4]."""
        batch = self.micro_batch
        of_loss = torch.stack([loss.isnan(), loss.isinf()])
        if batch.scores is None:
            return of_loss
        known = [batch.scores, batch.reference_losses]
        of_tokens = torch.stack([one for one in known if one is not None]).isnan() & batch.valid
        return torch.cat([of_loss, of_tokens.flatten(1).any(1)])

    def _refuse_reference(self) -> None:
        batch = self.micro_batch
        assert batch.reference_losses is not None
        nan = batch.reference_losses.isnan() & batch.valid
        raise UserError(
            f"the reference's losses of samples {nan.any(1).nonzero().flatten().tolist()} of "
            f"micro-batch {batch.number} are NaN (rank {torch.distributed.get_rank()}, iteration "
            f"{self.step.iteration}): its checkpoint is bad, or it needs --bf16"
        )
