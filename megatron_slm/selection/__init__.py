"""Decide which tokens count, and how much, from tensors and process groups alone."""

from megatron_slm.selection.carried import CarriedThreshold
from megatron_slm.selection.functions import Bound, token_score, token_weight
from megatron_slm.selection.goldfish import kept_by_goldfish
from megatron_slm.selection.named import NEED_REFERENCE, check_option_names
from megatron_slm.selection.ratio import RatioSchedule
from megatron_slm.selection.scores import SCORES, context_parallel_part, random_scores
from megatron_slm.selection.selector import Choice, Ranks, TokenSelector
from megatron_slm.selection.settings import SCOPES, SelectionSettings
from megatron_slm.selection.tokens import Tokens
from megatron_slm.selection.top_fraction import Placement, Selection, select_top_fraction
from megatron_slm.selection.weights import WEIGHTINGS, Chosen
from megatron_slm.selection.within_documents import DocumentPlaces

__all__ = [
    "NEED_REFERENCE",
    "SCOPES",
    "SCORES",
    "WEIGHTINGS",
    "Bound",
    "CarriedThreshold",
    "Choice",
    "Chosen",
    "DocumentPlaces",
    "Placement",
    "Ranks",
    "RatioSchedule",
    "Selection",
    "SelectionSettings",
    "TokenSelector",
    "Tokens",
    "check_option_names",
    "context_parallel_part",
    "kept_by_goldfish",
    "random_scores",
    "select_top_fraction",
    "token_score",
    "token_weight",
]
