"""Describe a model of a family that is converted, by itself and by Megatron's arguments.

An Architecture holds what the families of families.py have in common and where they differ.  Any
other setting of Megatron's that changes what is computed is refused by name.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

import msgspec

from megatron_slm.errors import UserError
from megatron_slm.model.experts import (
    FIXED_ROUTER,
    Experts,
    check_mixtures,
    experts_from_megatron,
    experts_to_megatron,
)
from megatron_slm.model.families import FAMILIES
from megatron_slm.model.numbers import Layers, Positive, Size

# Megatron's arguments that have only one value in all families.
FIXED_ARGUMENTS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "swiglu": True,
    "squared_relu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "use_mup": False,
    "hybrid_layer_pattern": None,
}

# Fields of Architecture in which the families differ, with Megatron's argument for each.
DIFFERENCES = {"qkv_bias": "add_qkv_bias", "qk_norm": "qk_layernorm"}

# Arguments of the model that Megatron's --use-checkpoint-args does not take from a checkpoint.
NOT_TAKEN_BY_MEGATRON = (
    "layernorm_epsilon",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
    "qk_layernorm",
    "moe_shared_expert_gate",
)


class MegatronArguments(msgspec.Struct):
    """Megatron's arguments in a checkpoint that describe an architecture."""

    num_layers: Layers
    hidden_size: Size
    ffn_hidden_size: Size
    num_attention_heads: Size
    kv_channels: Size
    max_position_embeddings: Size
    layernorm_epsilon: Positive
    rotary_base: Positive
    untie_embeddings_and_output_weights: bool
    group_query_attention: bool = False
    num_query_groups: Size | None = None
    use_rope_scaling: bool = False
    rope_scaling_factor: Positive = 8.0
    window_size: tuple[int, int] | None = None
    add_qkv_bias: bool | None = False
    qk_layernorm: bool | None = False
    slm_model_type: str | None = None


@dataclass(frozen=True)
class Architecture:
    """All that determines what a model computes, but for its weights."""

    layers: int
    """Number of layers."""
    hidden: int
    """Hidden size."""
    ffn: int
    """Intermediate size of the MLP."""
    heads: int
    """Number of attention heads."""
    groups: int
    """Number of key-value heads."""
    head_dim: int
    """Size of an attention head."""
    vocabulary: int
    """Number of tokens: rows of the embedding without padding."""
    positions: int
    """Longest sequence that the model was made for."""
    epsilon: float
    """Epsilon of the norms."""
    rope_theta: int
    """Base of the rotary embedding."""
    rope_scaling: float | None
    """Factor of Llama 3's scaling of the rotary embedding; None without it."""
    window: int | None
    """Number of tokens that a query sees, itself included; None for all before it."""
    tied: bool
    """Whether the output layer shares the embedding's weights."""
    model_type: str = "llama"
    """The type that the model has, or had, in config.json."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether each head's query and key are normed, with weights that all heads share."""
    experts: Experts | None = None
    """The mixtures of experts among its layers; None for a dense model."""

    @property
    def family(self) -> str:
        """The model type for transformers: the model's own, unless only another family has what it
        has, as only Mistral has a Llama's windows.

        Raises:
            UserError: no family has it.
        """
        has = {name for name in DIFFERENCES if getattr(self, name)}
        fitting = [
            name
            for name, family in FAMILIES.items()
            if family.has == has
            and (self.window is None or family.windows)
            and family.mixtures.fit(self.experts)
        ]
        if not fitting:
            raise UserError(
                f"no family that can be exported has all of {', '.join(sorted(has))}"
                + (" and a window" if self.window is not None else "")
                + (f" and {self.experts}" if self.experts is not None else "")
            )
        return self.model_type if self.model_type in fitting else fitting[0]


def check_sizes(a: Architecture, where: str) -> None:
    """Check that a model has sizes that Megatron can compute with, and transformers, too.

    Args:
        a: the model.
        where: path of the file that describes it, for errors.

    Raises:
        UserError: it has not.
    """
    if a.heads % a.groups:
        raise UserError(f"{where}: {a.groups} key-value heads do not divide {a.heads} heads")
    if a.head_dim % 2:
        raise UserError(f"{where}: heads of size {a.head_dim} cannot be rotated; it has to be even")
    if a.hidden % a.heads and FAMILIES[a.model_type].whole_heads and a.window is None:
        raise UserError(f"{where}: {a.heads} heads do not divide a hidden size of {a.hidden}")
    if a.experts is not None:
        check_mixtures(a.experts, where)


def rope_base(theta: Any, where: str) -> int:
    """Return the base of a rotary embedding, which has to be a positive integer in Megatron.

    Raises:
        UserError: it is not a positive integer.
    """
    try:
        if msgspec.convert(theta, Positive) == int(theta):
            return int(theta)
    except msgspec.ValidationError:
        pass
    raise UserError(
        f"{where}: rope_theta {brief(theta)} is not supported: Megatron's is a positive integer"
    )


def vocabulary_of(arguments: Namespace) -> int | None:
    """Return the number of tokens, without padding, of the model in a checkpoint.

    The arguments may have that of the model that the run started from, that of its tokenizer, or
    that which the import recorded, in this order of precedence.

    Args:
        arguments: the arguments in the checkpoint.

    Returns:
        The number of tokens; None if the arguments do not say.

    Raises:
        UserError: the argument is not a number of tokens.
    """
    for name in ("slm_model_vocab_size", "slm_vocab_size", "vocab_size"):
        found = getattr(arguments, name, None)
        if found is not None:
            return number_of_tokens(found, name)
    return None


def number_of_tokens(found: Any, name: str) -> int:
    """Check that an argument of a checkpoint is a number of tokens, and return it.

    Args:
        found: value of the argument.
        name: name of the argument, for errors.

    Raises:
        UserError: it is not a number of tokens.
    """
    try:
        return msgspec.convert(found, Size)
    except msgspec.ValidationError as error:
        raise UserError(f"the checkpoint's argument {name}: {error}") from error


def to_megatron(architecture: Architecture) -> dict[str, Any]:
    """Return Megatron's arguments for an architecture, by their names in a checkpoint."""
    a = architecture
    return FIXED_ARGUMENTS | {
        **{argument: getattr(a, name) for name, argument in DIFFERENCES.items()},
        "num_layers": a.layers,
        "hidden_size": a.hidden,
        "ffn_hidden_size": a.ffn,
        "num_attention_heads": a.heads,
        "group_query_attention": True,
        "num_query_groups": a.groups,
        "kv_channels": a.head_dim,
        "max_position_embeddings": a.positions,
        "layernorm_epsilon": a.epsilon,
        "rotary_base": a.rope_theta,
        "use_rope_scaling": a.rope_scaling is not None,
        "rope_scaling_factor": 8.0 if a.rope_scaling is None else a.rope_scaling,
        "window_size": None if a.window is None else (a.window - 1, 0),
        "untie_embeddings_and_output_weights": not a.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "vocab_size": a.vocabulary,
        "slm_model_type": a.family,
        **experts_to_megatron(a.experts),
    }


def from_megatron(arguments: Namespace, vocabulary: int, where: str) -> Architecture:
    """Read the architecture from the arguments in a checkpoint.

    Args:
        arguments: the arguments.
        vocabulary: number of tokens, without padding.
        where: path of the checkpoint, for errors.

    Raises:
        UserError: no family has such a model.
    """
    saved = vars(arguments)
    count = saved.get("num_experts")
    mixed = isinstance(count, int) and count > 0
    router = FIXED_ROUTER if mixed else {"num_experts": None}
    for name, only in (FIXED_ARGUMENTS | router).items():
        value = saved.get(name, only)
        plain = value is None or isinstance(value, bool | int | float | str | list | tuple)
        if not plain or (value != only and (value or only)):  # None, False and 0 mean the same
            raise UserError(
                f"{where}: {name} {brief(value)} has no counterpart in the models that are "
                f"converted, which have {only!r}"
            )
    try:
        m = msgspec.convert(saved, MegatronArguments)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: its arguments: {error}") from error
    if m.window_size is not None and (m.window_size[0] < 0 or m.window_size[1] > 0):
        raise UserError(
            f"{where}: window_size {m.window_size} is not a window of tokens before a query"
        )
    if m.slm_model_type is not None and m.slm_model_type not in FAMILIES:
        raise UserError(
            f"{where}: its argument slm_model_type is {brief(m.slm_model_type)}, which is none of "
            f"{', '.join(FAMILIES)}"
        )
    groups = m.num_query_groups if m.group_query_attention else None
    architecture = Architecture(
        layers=m.num_layers,
        hidden=m.hidden_size,
        ffn=m.ffn_hidden_size,
        heads=m.num_attention_heads,
        groups=groups or m.num_attention_heads,
        head_dim=m.kv_channels,
        vocabulary=vocabulary,
        positions=m.max_position_embeddings,
        epsilon=m.layernorm_epsilon,
        rope_theta=rope_base(m.rotary_base, where),
        rope_scaling=m.rope_scaling_factor if m.use_rope_scaling else None,
        window=None if m.window_size is None else m.window_size[0] + 1,
        tied=not m.untie_embeddings_and_output_weights,
        model_type=m.slm_model_type or "llama",
        experts=experts_from_megatron(saved, m.ffn_hidden_size, m.num_layers, where)
        if mixed
        else None,
        **{name: bool(getattr(m, argument)) for name, argument in DIFFERENCES.items()},
    )
    check_sizes(architecture, where)
    return architecture
