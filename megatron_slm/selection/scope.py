"""Which tokens compete with each other for selection."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_slm.selection.top_fraction import Segments, Selection, select_top_fraction


def select_in_micro_batch(
    scores: Tensor, valid: Tensor, ratio: float, cp_group: ProcessGroup
) -> Selection:
    """Select the top `ratio` of a micro-batch's valid tokens, over its context-parallel ranks.

    Token order is that of the whole micro-batch, sample by sample, so every context-parallel size
    selects the same tokens.

    Args:
        scores: float32 [b, s/c], this rank's part of the sequences in Megatron's zigzag order.
        valid: bool [b, s/c].
        ratio: in (0, 1].
        cp_group: the c ranks that hold the micro-batch together.
    """
    samples, length = scores.shape
    segments = None
    if cp_group.size() > 1:
        segments = Segments.zigzag(samples, length, cp_group.rank(), cp_group.size(), scores.device)
    selection = select_top_fraction(scores.flatten(), valid.flatten(), ratio, cp_group, segments)
    return replace(selection, selected=selection.selected.view(samples, length))
