"""Run a step of selective language modeling around Megatron's schedule, in this order:

reference     scores all micro-batches of the step in a forward-only pass of its own
ranking       (scope global-batch, exact) the policy scores them too, and all tokens are ranked
schedule      the policy's forward and backward passes, with an objective for each micro-batch
threshold     (scope global-batch, carried) finds what this step's exact threshold would have been
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from megatron.training.training import stimer
from torch import Tensor

from megatron_slm.loss import Scoring, Selecting, Telling, dense_losses, loss_of_selected
from megatron_slm.model.output_processor import take_output_processor
from megatron_slm.reference import Reference
from megatron_slm.selection import Ranks, Tokens, TokenSelector
from megatron_slm.training import nan, selected_backward
from megatron_slm.training.auxiliary_losses import auxiliary_scale
from megatron_slm.training.carried_thresholds import CarriedThresholds
from megatron_slm.training.data_iterators import for_model_chunks, form_of, own_iterator
from megatron_slm.training.device_timer import timed
from megatron_slm.training.dump import TokenDumps
from megatron_slm.training.micro_batch import MicroBatch, read_micro_batches, tell_lengths
from megatron_slm.training.objective import MicroBatchObjective
from megatron_slm.training.passes import (
    as_selector_takes,
    noting,
    run_in_shape,
    score_with_policy,
    with_reference,
)
from megatron_slm.training.settings import SelectiveSettings, Step
from megatron_slm.training.sources import Source


class SelectiveStep:
    """Runs the steps of a run.

    megatron_hooks.py makes Megatron call `run`, `save` and `finish`; `forward_step` is handed to
    Megatron's `pretrain()`.
    """

    def __init__(
        self,
        settings: SelectiveSettings,
        source: Source | None,
        dumps: TokenDumps | None,
        resumed: Namespace,
    ) -> None:
        """Prepare for steps; what needs models is built at the first one.

        Args:
            settings: the run's settings.
            source: where reference losses come from; None without a reference.
            dumps: writes token dumps; None if none are asked for.
            resumed: the arguments of the run that this one resumes; empty if it starts afresh.
        """
        self.settings = settings
        self.source = source
        self.dumps = dumps
        self.dump: Callable[..., None] | None = None
        """Writes a token dump, with the arguments of the last step."""
        self.reference: Reference | None = None
        """The reference that runs; None before the first step, and in a run that computes none."""
        self.step: Step | None = None
        """The current step, or the last one."""
        self.ranks_whole_steps = settings.selection.scope == "global-batch"
        self.carried: CarriedThresholds | None = None
        if self.ranks_whole_steps and not settings.selection.exact:
            self.carried = CarriedThresholds(settings, resumed)

    def _build(self, model: list[torch.nn.Module]) -> None:
        """Build what needs process groups and the policy's loaded weights."""
        take_output_processor(*model)
        self.auxiliary = auxiliary_scale(get_args(), model, bool(self.settings.left_out))
        self.selector = TokenSelector(
            self.settings.selection,
            Ranks(
                cp_group=mpu.get_context_parallel_group(),
                dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
                dp_rank=mpu.get_data_parallel_rank(),
                dp_size=mpu.get_data_parallel_world_size(),
                tp_group=mpu.get_tensor_model_parallel_group(),
            ),
        )
        if self.carried is not None:
            self.carried.agree()
        if self.source is not None and self.source.build is not None:
            self.reference = self.source.build()

    def run(
        self,
        schedule: Callable[..., Any],
        *,
        data_iterator: Any,
        forward_only: bool = False,
        **arguments: Any,
    ) -> Any:
        """Run a step in place of the schedule, with the schedule's arguments.

        Args:
            schedule: Megatron's schedule.
            data_iterator: the step's data iterator, or one for each model chunk.
            forward_only: whether this is a step of validation.
            arguments: the schedule's other arguments.
        """
        if self.step is None:
            self._build(arguments["model"])
        schedule = partial(run_in_shape, schedule)
        # Validation alone (--skip-train) never sets the current iteration.
        iteration = getattr(get_args(), "curr_iteration", get_args().iteration)
        form = form_of(data_iterator)
        if self.dumps is not None and not forward_only:
            self.dump = partial(self._dump, schedule, form, arguments)
            self.dump(iteration)
        self.step = step = self._begin(not forward_only, iteration)
        selected_backward.prepare_layers(arguments["model"], step, self.settings)
        if self.reference is not None:
            self.reference.before_step(arguments["model"], iteration if step.training else None)
        micro_batches = self._read(step, own_iterator(data_iterator), arguments)
        ranks_whole = self.ranks_whole_steps and step.training and step.selects
        seen: list[MicroBatch] = []
        if ranks_whole and self.carried is None:
            with timed("slm-ranking"):
                micro_batches = iter(self._rank_step(schedule, form, micro_batches, arguments))
        elif ranks_whole:
            micro_batches = noting(micro_batches, seen)
        if self.auxiliary is not None and step.training:
            read = list(micro_batches)
            whole = ranks_whole and (self.carried is None or step.thresholds is not None)
            self.auxiliary.set_for(step, read, self.selector, whole)
            micro_batches = iter(read)
        try:
            result = schedule(
                data_iterator=for_model_chunks(form, micro_batches),
                forward_only=forward_only,
                **arguments,
            )
        except RuntimeError as error:
            nan.check_error(error, step)
            raise
        nan.check_step(step)
        if ranks_whole and self.carried is not None:
            last = mpu.is_pipeline_last_stage()
            exact = self.selector.select_from_step(*self._whole_step(seen)) if last else None
            self.carried.after(iteration, exact)
        return result

    def _read(
        self, step: Step, data_iterator: Any, arguments: dict[str, Any]
    ) -> Iterator[MicroBatch]:
        """Read a step's micro-batches, with reference losses if the step selects tokens."""
        count, size = arguments["num_microbatches"], arguments["micro_batch_size"]
        by_domain = self.source is not None and self.source.by_domain
        micro_batches = read_micro_batches(
            data_iterator,
            size,
            count,
            with_domains=bool(self.settings.domains)
            and (step.training or by_domain or "datasets" in self._needs),
            with_losses=self.source is not None and self.source.caches is not None,
            with_tokens="token_ids" in self._needs,
            with_external="external" in self._needs,
            left_out=self.settings.left_out if step.training else None,
        )
        if step.training:
            micro_batches = map(tell_lengths, micro_batches)
        if self.reference is None or not step.selects:
            return micro_batches
        # Only training steps are timed, as in Megatron's own interval time.
        with timed("slm-reference", when=step.training):
            return iter(with_reference(self.reference, micro_batches, count, size))

    def forward_step(
        self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module
    ) -> tuple[Tensor, MicroBatchObjective]:
        """Pass one micro-batch through the policy: Megatron's `forward_step_func`."""
        assert self.step is not None
        micro_batch = next(data_iterator)
        objective = MicroBatchObjective(micro_batch, self.settings, self.step, self.selector)
        head = self._head(objective) if get_attr_wrapped_model(model, "post_process") else {}
        stimer.start()  # for --log-straggler; as a context, it would print errors with tracebacks
        output = model(**micro_batch.model_inputs(get_args()), **head)
        stimer.stop()
        return output, objective

    def save(self, iteration: int) -> None:
        """Write what the policy's checkpoint of `iteration` needs beside it.  Collective."""
        if self.reference is not None:
            self.reference.save(get_args().save, iteration)

    @property
    def computes_reference(self) -> bool:
        """Whether there is a reference that runs, rather than a cache of its losses."""
        return self.source is not None and self.source.build is not None

    @property
    def _scoring(self) -> Scoring:
        """What passes of the policy that are not training compute."""
        return Scoring(
            get_args().slm_vocab_size,
            entropies="entropies" in self._needs,
            top_entropies="top_entropies" in self._needs,
            dense=self.settings.head == "dense",
        )

    @property
    def _needs(self) -> frozenset[str]:
        """What the run's score and weight read, beside losses."""
        return self.settings.selection.needs if self.settings.selective else frozenset()

    def _head(self, objective: MicroBatchObjective) -> dict[str, Any]:
        """Return the arguments that make the model use another head than its own, if any."""
        args = get_args()
        assert self.step is not None
        padded = self.step.selects and args.slm_vocab_size < args.padded_vocab_size
        if self.settings.head == "chunked":
            needs = self._needs if self.step.selects else ()  # nothing during warm-up
            return {
                "output_processor": loss_of_selected,
                "output_processor_context": Selecting(
                    objective.weigh,
                    args.slm_vocab_size if padded else None,
                    entropies="entropies" in needs,
                    top_entropies="top_entropies" in needs,
                    most=objective.most_counted,
                ),
            }
        if padded:
            return {
                "output_processor": dense_losses,
                "output_processor_context": Telling(objective.tell, args.slm_vocab_size),
            }
        return {}

    def _begin(self, training: bool, iteration: int) -> Step:
        args, settings = get_args(), self.settings
        warming_up = args.consumed_train_samples * args.seq_length < settings.warmup_tokens
        ratio = settings.schedule.at(iteration)
        thresholds = self.carried.before(iteration) if training and self.carried else None
        if ratio == 1.0 and not settings.selection.domain_ratios:
            thresholds = None  # those of earlier steps would leave some tokens out
        return Step(
            iteration=iteration,
            training=training,
            selects=settings.selective and not (training and warming_up),
            ratio=ratio,
            thresholds=thresholds,
        )

    def _rank_step(
        self,
        schedule: Callable[..., Any],
        form: list[None] | None,
        micro_batches: Iterator[MicroBatch],
        arguments: dict[str, Any],
    ) -> list[MicroBatch]:
        """Read all micro-batches, score them with the policy, and choose from all at once."""
        read, scored = score_with_policy(schedule, form, micro_batches, arguments, self._scoring)
        if mpu.is_pipeline_last_stage():
            assert self.step is not None
            for batch, said in zip(read, scored, strict=True):
                MicroBatchObjective(batch, self.settings, self.step, self.selector).score(**said)
            tokens = Tokens.joined([batch.scored for batch in read if batch.scored is not None])
            choice = self.selector.choose_from_step(*self._whole_step(read), tokens)
            for batch, part in zip(read, choice.split(len(read)), strict=True):
                batch.choice = part
        return read

    def finish(self, iteration: int) -> None:
        """Write the last token dump, when training has ended after `iteration` iterations."""
        if self.dump is not None:
            self.dump(iteration, ends=True)

    def _dump(
        self,
        schedule: Callable[..., Any],
        form: list[None] | None,
        arguments: dict[str, Any],
        iteration: int,
        ends: bool = False,
    ) -> None:
        """Write a token dump of the policy after `iteration` iterations, if it is time."""
        assert self.dumps is not None
        if not self.dumps.due(iteration, ends):
            return
        # It selects with a training step's thresholds, but is not a step of training.
        step = self._begin(True, iteration)
        step = replace(step, training=False, selects=self.settings.selective)
        if self.reference is not None:
            self.reference.before_step(arguments["model"], None)

        def score(batches: list[MicroBatch]) -> list[dict[str, Tensor]]:
            sizes = {"num_microbatches": len(batches)}
            _, scored = score_with_policy(
                schedule, form, iter(batches), arguments | sizes, self._scoring
            )
            return scored

        with timed("slm-dump"):
            self.dumps.take(step, self.selector, self.reference, score)

    def _whole_step(
        self, read: list[MicroBatch]
    ) -> tuple[Tensor, Tensor, float, Tensor | None, int]:
        """Return the scores of a whole step, and the step as the selector takes it."""
        assert self.step is not None
        scores = torch.cat([batch.scores for batch in read if batch.scores is not None])
        return scores, *as_selector_takes(read, self.step.ratio)
