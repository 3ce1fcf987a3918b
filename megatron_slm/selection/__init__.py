"""Decide which tokens count, and how much, from tensors and process groups alone."""

from megatron_slm.selection.carried import CarriedThreshold
from megatron_slm.selection.ratio import RatioSchedule
from megatron_slm.selection.scores import (
    NEED_REFERENCE,
    SCORES,
    context_parallel_part,
    random_scores,
    token_scores,
)
from megatron_slm.selection.selector import (
    SCOPES,
    Choice,
    Ranks,
    SelectionSettings,
    TokenSelector,
)
from megatron_slm.selection.top_fraction import Placement, Selection, select_top_fraction
from megatron_slm.selection.weights import WEIGHTINGS
from megatron_slm.selection.within_documents import DocumentPlaces

__all__ = [
    "NEED_REFERENCE",
    "SCOPES",
    "SCORES",
    "WEIGHTINGS",
    "CarriedThreshold",
    "Choice",
    "DocumentPlaces",
    "Placement",
    "Ranks",
    "RatioSchedule",
    "Selection",
    "SelectionSettings",
    "TokenSelector",
    "context_parallel_part",
    "random_scores",
    "select_top_fraction",
    "token_scores",
]
