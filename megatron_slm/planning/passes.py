"""What the passes of a step through the layers cost, also where the backward pass goes through
selected tokens alone (megatron_slm/model/selected_layers.py)."""

from __future__ import annotations

from megatron_slm.model.architecture import Architecture


def layer_flops(projections: int, attention: int, run_again: float, through: float) -> int:
    """Count the FLOPs of a forward and a backward pass, including recomputation.

    The backward pass takes twice the forward's FLOPs.  Attention takes half a forward more, since
    its scores are not kept (Dao et al. 2022, arXiv 2205.14135, section 3.1).

    Args:
        projections: FLOPs of a forward pass's projections.
        attention: FLOPs of its attention.
        run_again: share of the layers whose activations are recomputed.
        through: share of the tokens that the backward pass goes through.
    """
    if through < 1.0:  # attention always runs again for these tokens
        return int((1 + (2 + run_again) * through) * projections + (1 + 3.5 * through) * attention)
    return 3 * projections + 7 * attention // 2 + int(run_again * (projections + attention))


def values_for_selected(a: Architecture, tp: int, split: int, recomputes: bool) -> int:
    """Count the values of a token that a layer keeps for a backward pass through selected tokens.

    These are its input, keys and values, and, unless activations are recomputed, the products of
    its linear layers: fused q, k and v (of which v is a view), attention's output, gate and up.

    Args:
        a: the architecture.
        tp: tensor-parallel size.
        split: number of ranks that a layer's input is split over.
        recomputes: whether activations are recomputed.
    """
    key = a.groups * a.head_dim
    if recomputes:
        return a.hidden // split + 2 * key // tp
    return a.hidden // split + a.hidden + (a.heads * a.head_dim + 3 * key + 2 * a.ffn) // tp
