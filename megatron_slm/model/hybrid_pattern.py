"""Read the pattern of a HybridModel's layers, and say which of them cannot be built here.

A pattern has a letter or sign a layer (Megatron's --hybrid-layer-pattern), with "|" between
pipeline stages, and after "/" the layers that predict further tokens.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern

from megatron_slm.errors import UserError

PLAIN = {Symbols.ATTENTION, Symbols.MLP, Symbols.MOE}
"""Layers that have a form in plain torch."""
RECURRENT = {Symbols.MAMBA: "Mamba", Symbols.GDN: "gated delta nets"}
"""Layers that pass a state from token to token."""
KERNELS = {
    Symbols.MAMBA: ("mamba_ssm", "mamba-ssm"),
    Symbols.GDN: ("fla", "flash-linear-attention"),
}
"""The module that a kind of layer needs, and the package that has it."""
SPECS = ("hybrid_stack_spec", "mamba_stack_spec")
"""Names by which --spec may name the layers that Megatron takes without it."""


def layers_of(pattern: str) -> str:
    """Return the layers of a pattern, a character each, whatever its pipeline stages."""
    return (parse_hybrid_pattern(pattern).main_pattern or "").replace(Symbols.PIPE, "")


def check_layers(pattern: str, where: str) -> None:
    """Refuse a pattern that is none, or whose layers cannot be built here.

    Args:
        pattern: the pattern.
        where: what has it, for the error.

    Raises:
        UserError: one of the layers is unknown, or needs a package that is not installed.
    """
    try:
        layers = layers_of(pattern)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if Symbols.DS_ATTENTION in layers:
        raise UserError(f"{where}: layers D (sparse attention) have a loss of their own")
    for symbol in sorted(set(layers) - PLAIN):
        needs = [] if HAVE_TE else ["Transformer Engine"]
        module, package = KERNELS.get(symbol, ("", ""))
        if module and find_spec(module) is None:
            needs.append(package)
        if needs:
            kind = RECURRENT.get(symbol, "multi-latent attention")
            raise UserError(
                f"{where}: layers {symbol} ({kind}) need {' and '.join(needs)}, not installed here"
            )
