"""Which tokens count: exact top-k over one rank or many.  Tensors and process groups only."""

from megatron_slm.selection.scope import select_in_micro_batch
from megatron_slm.selection.top_fraction import Segments, Selection, select_top_fraction

__all__ = ["Segments", "Selection", "select_in_micro_batch", "select_top_fraction"]
