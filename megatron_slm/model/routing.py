"""Know the ways of routing tokens to experts that passes without training can repeat."""

from __future__ import annotations

from argparse import Namespace

OTHER_ROUTING = {
    "sinkhorn": "routes otherwise in evaluation than in training",
    "quantile_balancing": "is not supported",
}
"""Megatron's ways of balancing experts that are refused, and why."""


def balancing_of(arguments: Namespace) -> list[str]:
    """Return the ways of balancing experts that Megatron's arguments name, one or several."""
    named = getattr(arguments, "moe_router_load_balancing_type", None) or []
    return [named] if isinstance(named, str) else list(named)
