"""What the arguments ask for, as the rest of training/ takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_slm.selection import RatioSchedule, SelectionSettings


@dataclass(frozen=True)
class SelectiveSettings:
    """selection, schedule: which tokens are selected, and how large a part of them.
    warmup_tokens: tokens of causal language modeling before the first selection.
    selective: whether any selection takes place; if not, this is causal language modeling.
    has_reference: whether there are reference losses.
    head: how the policy's output layer and loss are computed (loss/chunked.py compares the two).
    domains: names of the blend's datasets, empty where there is no blend.
    seed: of random scores.
    """

    selection: SelectionSettings
    schedule: RatioSchedule
    warmup_tokens: int
    selective: bool
    has_reference: bool
    head: Literal["dense", "chunked"]
    domains: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Step:
    """One step, or one validation step.

    iteration: from 0.  training: False in validation.
    selects: False while all tokens are trained on: no selection, or warm-up.
    ratio: token selection ratio, in (0, 1].
    thresholds: float32 [sets], carried from the steps before; None if they are not.
    """

    iteration: int
    training: bool
    selects: bool
    ratio: float
    thresholds: Tensor | None = None
