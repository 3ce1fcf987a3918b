"""Compute the loss of one micro-batch as Megatron's schedules want it, and report it.

Training maximises nothing but the log-likelihood of the selected tokens (Rho-1, eq. 3-5):

    excess = policy loss - reference loss       of each token, without gradient (or another score);
                                                both without the vocabulary's padding in the softmax
    selected = top k% of the excess             among valid tokens of the micro-batch (or scope)
    loss = sum of the selected tokens' policy losses / number selected in the global batch, with
           Megatron's softmax, which includes the padding

The schedule receives sum and number.  Megatron's per-token-loss path adds up both over
micro-batches, data- and context-parallel ranks, and divides once.

The host waits for the device once a micro-batch, to learn whether anything is NaN or infinite; this
is Megatron's own check of a loss, for which plain Megatron waits twice.  With the chunked head it
waits a second time if only the device knows how many tokens count (TokenSelector.most_selected),
and with --sft, whose masked prompts would otherwise be computed for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.loss import same_on_ranks
from megatron_slm.model.documents import by_sample
from megatron_slm.selection import (
    Choice,
    DocumentPlaces,
    Tokens,
    TokenSelector,
    random_scores,
)
from megatron_slm.training.loss_report import report_of
from megatron_slm.training.micro_batch import MicroBatch, own_part
from megatron_slm.training.nan import megatron_looks
from megatron_slm.training.settings import SelectiveSettings, Step

# Megatron's own definition of a spiky loss: this many times the largest loss so far.
SPIKY_LOSS_FACTOR = 10
# The faults that each micro-batch is checked for, in the words of the errors.
FAULTS = ("NaN in the loss", "Inf in the loss", "NaN in the token scores")


class MicroBatchObjective:
    """Selects tokens once the policy's losses are known; the schedule calls it for the loss."""

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
        """Losses of all tokens without padding in the softmax, which they are scored by."""
        self.trained: Tensor | None = None
        """Losses of all tokens with Megatron's softmax, which includes the padding."""
        self.choice: Choice | None = None
        """The tokens chosen, if any are."""

    @property
    def most_counted(self) -> int | None:
        """The most tokens that can count; None if only the device knows, or if far fewer will."""
        if get_args().sft:
            return None
        assert self.micro_batch.labels is not None
        samples, length = self.micro_batch.labels.shape
        if not self.step.selects:
            return samples * length
        return self.selector.most_selected(samples, length, self.step.ratio)

    def tell(self, losses: Tensor) -> None:
        """Take the dense head's losses without padding, before the model returns those with it."""
        self.losses = losses

    def weigh(
        self,
        losses: Tensor,
        entropies: Tensor | None = None,
        trained: Tensor | None = None,
        *,
        top_entropies: Tensor | None = None,
    ) -> Tensor:
        """Return how much each token counts, float32 [b, s/c], or whether it counts, bool [b, s/c].

        All are [1, b * s/c] if the model was given its samples as one sequence.

        Args:
            losses: the policy's losses without padding in the softmax, float32 [b, s/c].
            entropies: its entropies, if the score or the weight needs them.
            trained: its losses with padding.
            top_entropies: its entropies among the likeliest tokens, if needed.
        """
        batch, shape = self.micro_batch, losses.shape
        known = (losses, entropies, trained, top_entropies)
        losses, entropies, trained, top_entropies = map(self._by_sample, known)
        self.losses, self.trained = losses, trained
        if not self.step.selects:
            return batch.valid.view(shape)
        assert losses is not None
        scores = self.score(losses, entropies, top_entropies)
        self.choice = batch.choice or self._choose(batch, scores)
        counted = self.choice.selected if self.choice.weights is None else self.choice.weights
        return counted.view(shape)

    def _by_sample(self, values: Tensor | None) -> Tensor | None:
        """Return values of tokens, which may be [1, b * s/c], as [b, s/c]."""
        assert self.micro_batch.loss_mask is not None
        length = self.micro_batch.loss_mask.shape[1]
        return None if values is None else by_sample(values, length)

    def score(
        self,
        losses: Tensor,
        entropies: Tensor | None = None,
        top_entropies: Tensor | None = None,
    ) -> Tensor:
        """Set and return the tokens' scores, given the policy's losses and entropies."""
        batch, selection = self.micro_batch, self.settings.selection
        batch.scored = self._tokens(losses, entropies, top_entropies)
        batch.scores = selection.scorer(batch.scored, group=mpu.get_tensor_model_parallel_group())
        return batch.scores

    def _tokens(
        self, losses: Tensor, entropies: Tensor | None, top_entropies: Tensor | None
    ) -> Tokens:
        """Gather what the score and the weight read."""
        batch, needs = self.micro_batch, self.settings.selection.needs
        samples, length = losses.shape
        size = mpu.get_context_parallel_world_size()
        can_be_had: dict[str, Callable[[], Tensor | None]] = {
            "entropies": lambda: entropies,
            "top_entropies": lambda: top_entropies,
            "reference_losses": lambda: batch.reference_losses,
            "reference_entropies": lambda: batch.reference_entropies,
            "labels": lambda: batch.labels,
            "token_ids": lambda: batch.token_ids,
            "positions": lambda: own_part(
                torch.arange(length * size, device=losses.device).expand(samples, -1)
            ),
            "documents": lambda: batch.documents,
            "document_positions": lambda: batch.document_positions,
            "datasets": lambda: _of_samples(batch.domains, length),
            "external": lambda: batch.external,
            "random": lambda: self._draw(losses),
        }
        found = {name: can_be_had[name]() for name in sorted(needs - {"scores"})}
        for name, values in found.items():
            assert values is not None, f"tokens.{name} was not read"
        known = {name: values for name, values in found.items() if values is not None}
        return Tokens(losses, batch.valid, **known)

    def _draw(self, losses: Tensor) -> Tensor:
        """Return random scores for the tokens of these losses, which do not depend on the layout.

        They are float32 [b, s/c].
        """
        samples, length = losses.shape
        number, size = self.micro_batch.number, mpu.get_context_parallel_world_size()
        first = number * mpu.get_data_parallel_world_size() + mpu.get_data_parallel_rank()
        numbers = torch.arange(samples) + first * samples
        seed, iteration = self.settings.seed, self.step.iteration
        return own_part(random_scores(seed, iteration, numbers, length * size, losses.device))

    def _choose(self, batch: MicroBatch, scores: Tensor) -> Choice:
        if self.step.thresholds is not None:
            thresholds = self.step.thresholds
            return self.selector.choose_above(
                scores, batch.valid, thresholds, batch.domains, batch.scored
            )
        documents = None
        if self.selector.settings.scope == "document":
            assert batch.documents is not None and batch.document_positions is not None
            documents = DocumentPlaces(batch.documents, batch.document_positions)
        return self.selector.choose(
            scores, batch.valid, self.step.ratio, batch.domains, documents, batch.scored
        )

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss: Megatron's loss function.

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
            return {"lm loss": torch.stack([loss.detach(), count.float()])}
        assert self.losses is not None and self.trained is not None
        return report_of(
            self.micro_batch,
            self.choice,
            loss.detach(),
            losses=self.losses,
            trained=self.trained,
            domains=self.settings.reported,
            # In validation lm loss means what it means in every Megatron run: all tokens.
            of_all=not self.step.training,
        )

    def _check(self, loss: Tensor) -> None:
        """Make Megatron's checks of a loss, and check that no score is NaN.

        Raises:
            UserError: the reference overflows.  No loss scale mends this, and Megatron would not
                notice, since it checks nothing under fp16.
        """
        args = get_args()
        batch = self.micro_batch
        read = cache(self._faults(loss).tolist)  # read once for all checks: here the host waits

        def found(number: int) -> bool:
            flags = read()
            if flags[-1] and len(flags) > len(FAULTS):
                self._refuse_reference()
            return number < len(flags) and bool(flags[number])

        rerun = get_rerun_state_machine()
        # Detached, since it is compared with a repeat's after the schedule has freed the loss.
        validate = partial(rerun.validate_result, result=loss.detach(), tolerance=0.0)
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
        """Return whether each of FAULTS is there, and whether reference losses are NaN, as bool.

        The result has 4 elements; without a reference 3, and without scores 2.
        """
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


def _of_samples(values: Tensor | None, length: int) -> Tensor | None:
    """Repeat a value of each sample, [b], for its tokens, [b, s/c]."""
    return None if values is None else values[:, None].expand(-1, length)
