"""Describe a model's mixtures of experts, and translate them to and from Megatron's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from megatron_slm.errors import UserError
from megatron_slm.model.numbers import ExpertCount, Size, SizeOrNone

MOST_EXPERTS = 100_000  # of all layers: bounds the memory for tables of all tensors

# Megatron's arguments of a router that have only one value in all families.
FIXED_ROUTER: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}


@dataclass(frozen=True)
class Experts:
    """The mixtures of experts of a model."""

    count: int
    """Number of experts of a layer."""
    top_k: int
    """Number of experts that a token goes to."""
    ffn: int
    """Intermediate size of an expert."""
    shared_ffn: int
    """Intermediate size of the gated expert that all tokens go to; 0 without one."""
    normed: bool
    """Whether the weights of a token's experts sum to one."""
    layers: tuple[bool, ...]
    """Whether each layer is a mixture of experts; the others have one MLP."""


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of experts that a family has, and the names of their tensors."""

    kind: Literal["none", "all layers", "some layers", "shared"] = "none"
    """None; in all layers, with weights that sum to one; in some layers or all; or such with a
    shared expert."""
    block: str = "mlp"
    """Name of the module."""
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's projections."""

    def fit(self, experts: Experts | None) -> bool:
        """Return whether the family has such mixtures."""
        if experts is None:
            return self.kind == "none"
        if self.kind == "all layers":
            return not experts.shared_ffn and experts.normed and all(experts.layers)
        return self.kind == ("shared" if experts.shared_ffn else "some layers")


class RouterArguments(msgspec.Struct):
    """Megatron's arguments in a checkpoint that describe mixtures of experts."""

    num_experts: ExpertCount
    moe_router_topk: Size
    moe_ffn_hidden_size: Size | None = None
    moe_router_pre_softmax: bool | None = False
    moe_shared_expert_intermediate_size: SizeOrNone | None = None
    moe_shared_expert_gate: bool | None = False
    moe_layer_freq: int | list[int] = 1


def experts_to_megatron(e: Experts | None) -> dict[str, Any]:
    """Return Megatron's arguments for mixtures of experts; for None, those of a model without."""
    if e is None:
        return {"num_experts": None}
    return FIXED_ROUTER | {
        "num_experts": e.count,
        "moe_router_topk": e.top_k,
        "moe_ffn_hidden_size": e.ffn,
        "moe_router_pre_softmax": not e.normed,
        "moe_shared_expert_intermediate_size": e.shared_ffn or None,
        "moe_shared_expert_gate": e.shared_ffn > 0,
        "moe_layer_freq": 1 if all(e.layers) else [int(layer) for layer in e.layers],
    }


def experts_from_megatron(saved: dict[str, Any], ffn: int, layers: int, where: str) -> Experts:
    """Read mixtures of experts from the arguments in a checkpoint.

    Args:
        saved: the arguments.
        ffn: intermediate size of an MLP, which an expert has unless the arguments say otherwise.
        layers: number of layers.
        where: path of the checkpoint, for errors.

    Raises:
        UserError: no family has such mixtures.
    """
    try:
        m = msgspec.convert(saved, RouterArguments)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: its arguments: {error}") from error
    frequency = m.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(layer % max(1, frequency) == 0) for layer in range(layers)]
    if len(frequency) != layers:
        raise UserError(f"{where}: moe_layer_freq has {len(frequency)} layers and not {layers}")
    shared = m.moe_shared_expert_intermediate_size or 0
    if shared and not m.moe_shared_expert_gate:
        raise UserError(f"{where}: shared experts without moe_shared_expert_gate are of no family")
    experts = Experts(
        count=m.num_experts,
        top_k=m.moe_router_topk,
        ffn=m.moe_ffn_hidden_size or ffn,
        shared_ffn=shared,
        normed=not m.moe_router_pre_softmax,
        layers=tuple(bool(layer) for layer in frequency),
    )
    check_mixtures(experts, where)
    return experts


def check_mixtures(e: Experts, where: str) -> None:
    """Check that mixtures of experts are ones that Megatron computes as transformers does.

    Raises:
        UserError: they are not.
    """
    if e.count * len(e.layers) > MOST_EXPERTS:
        raise UserError(
            f"{where}: {len(e.layers)} layers of {e.count} experts each are more than the "
            f"{MOST_EXPERTS} experts that are supported"
        )
    if e.top_k > e.count:
        raise UserError(f"{where}: tokens go to {e.top_k} experts, and there are {e.count}")
    if e.top_k == 1 and e.normed:
        raise UserError(f"{where}: one expert a token, whose weight is normed to 1, learns nothing")
    if not any(e.layers):
        raise UserError(f"{where}: none of its layers is a mixture of experts")
