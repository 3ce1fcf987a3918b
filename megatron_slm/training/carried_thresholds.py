"""Carry a run's thresholds from step to step, and from checkpoint to checkpoint.

selection/carried.py says how they change.  This module makes them known to all pipeline stages,
any of which may write the checkpoint, and keeps them in Megatron's arguments, which checkpoints
contain.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from megatron_slm.selection import CarriedThreshold, Selection
from megatron_slm.training.settings import SelectiveSettings


class CarriedThresholds:
    """The thresholds of a run with --slm-global-batch carried."""

    def __init__(self, settings: SelectiveSettings, resumed: Namespace) -> None:
        """Take up the thresholds of a run that this one resumes.

        Args:
            settings: the run's settings.
            resumed: the arguments of the run that this one resumes; empty if it starts afresh.
        """
        selection = settings.selection
        self.sets = max(1, len(selection.domain_ratios))
        # Thresholds of another score, or of other sets, would mean nothing.
        domains = settings.domains if selection.domain_ratios else ()
        self.made_for = (selection.score, *selection.scorer.options.items(), *domains)
        same = getattr(resumed, "slm_carried_for", None) == self.made_for
        state = getattr(resumed, "slm_carried_threshold", None) if same else None
        self.carried = CarriedThreshold.from_state(state)

    def agree(self) -> None:
        """Take up the latest thresholds that a rank has found.  Collective over all ranks.

        A rank may have read an older tracker file than others, and Megatron goes by the latest.
        """
        states: list[tuple[int, tuple[float, ...]] | None]
        states = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, self.carried.state())
        known = [state for state in states if state is not None]
        self.carried = CarriedThreshold.from_state(max(known) if known else None)

    def before(self, iteration: int) -> Tensor | None:
        """Return the thresholds of a step, float32 [sets]; None before the first step."""
        thresholds = self.carried.before(iteration)
        if thresholds is None:
            return None
        return torch.tensor(thresholds, device=torch.cuda.current_device())

    def after(self, iteration: int, exact: Selection | None) -> None:
        """Average a step's exact thresholds into the running ones.  Collective over the pipeline.

        Args:
            iteration: the step.
            exact: what is selected from the whole step, on the last pipeline stage; None elsewhere.
        """
        found = torch.zeros(2, self.sets, device=torch.cuda.current_device())
        if exact is not None:
            # The threshold of a step that overflows must not enter the average.
            known = (exact.count > 0) & exact.threshold.isfinite()
            found[0] = torch.where(known, exact.threshold, 0.0)
            found[1] = known
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                found,
                mpu.get_pipeline_model_parallel_last_rank(),
                group=mpu.get_pipeline_model_parallel_group(),
            )
        thresholds, has_tokens = found.tolist()
        self.carried.after(iteration, thresholds, [bool(any_) for any_ in has_tokens])
        get_args().slm_carried_threshold = self.carried.state()
        get_args().slm_carried_for = self.made_for
