"""Describe a Llama or Mistral, and translate between config.json and Megatron's arguments.

Llama 1 to 3, TinyLlama and Mistral share one architecture: RMSNorm, rotary embeddings, grouped
queries, SwiGLU and no biases.  Mistral adds a sliding window, which not all its models have.  Any
other setting, on either side, that changes what is computed is refused by name.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, Literal

import msgspec

from megatron_slm.errors import UserError
from megatron_slm.model.hugging_face_config import (
    LLAMA3_ROPE,
    Layers,
    Positive,
    Size,
    rope,
    rope_base,
    typed_config,
)

CAUSAL_LM = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Megatron's arguments that have only one value in this architecture.
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
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "use_mup": False,
    "hybrid_layer_pattern": None,
}

# Arguments of the model that Megatron's --use-checkpoint-args does not take from a checkpoint.
NOT_TAKEN_BY_MEGATRON = (
    "layernorm_epsilon",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
)


class MegatronArguments(msgspec.Struct):
    """Megatron's arguments in a checkpoint that describe a Llama or Mistral."""

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
    slm_model_type: Literal["llama", "mistral"] | None = None


@dataclass(frozen=True)
class Architecture:
    """All that determines what a Llama or Mistral computes, but for its weights."""

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
    """The model's type in config.json; Llama and Mistral without a window are the same."""

    @property
    def family(self) -> str:
        """The model type that transformers uses; only Mistral's supports windows."""
        return self.model_type if self.window is None else "mistral"


def from_hugging_face(config: dict[str, Any], where: str) -> Architecture:
    """Read the architecture from a config.json.

    Args:
        config: content of the file.
        where: path of the file, for errors.

    Raises:
        UserError: the model has another architecture, or an option that Megatron cannot compute.
    """
    c = typed_config(config, where)
    theta, scaling = rope(c, where)
    return _computable(
        Architecture(
            layers=c.num_hidden_layers,
            hidden=c.hidden_size,
            ffn=c.intermediate_size,
            heads=c.num_attention_heads,
            groups=c.num_key_value_heads or c.num_attention_heads,
            head_dim=c.head_dim or c.hidden_size // c.num_attention_heads,
            vocabulary=c.vocab_size,
            positions=c.max_position_embeddings,
            epsilon=c.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            window=c.window,
            tied=c.tie_word_embeddings,
            model_type=config["model_type"],
        ),
        where,
    )


def _computable(a: Architecture, where: str) -> Architecture:
    """Return the architecture, unless its sizes are ones that transformers or Megatron refuses."""
    if a.heads % a.groups:
        raise UserError(f"{where}: {a.groups} key-value heads do not divide {a.heads} heads")
    if a.head_dim % 2:
        raise UserError(f"{where}: heads of size {a.head_dim} cannot be rotated; it has to be even")
    if a.hidden % a.heads and a.family == "llama":
        raise UserError(f"{where}: {a.heads} heads do not divide a hidden size of {a.hidden}")
    return a


def to_hugging_face(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Return a config.json that versions 4 and 5 of transformers read.

    Args:
        architecture: the model.
        dtype: torch's name of the weights' type, such as bfloat16.
    """
    a = architecture
    config = {
        "architectures": [CAUSAL_LM[a.family]],
        "model_type": a.family,
        "hidden_act": "silu",
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.groups,
        "head_dim": a.head_dim,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": a.positions,
        "rms_norm_eps": a.epsilon,
        "rope_theta": float(a.rope_theta),
        "rope_scaling": None,
        "tie_word_embeddings": a.tied,
        "torch_dtype": dtype,
    }
    if a.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": a.rope_scaling} | LLAMA3_ROPE
    if a.family == "mistral":
        config["sliding_window"] = a.window  # transformers assumes 4096 if it is absent
    return config


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
    }


def from_megatron(arguments: Namespace, vocabulary: int, where: str) -> Architecture:
    """Read the architecture from the arguments in a checkpoint.

    Args:
        arguments: the arguments.
        vocabulary: number of tokens, without padding.
        where: path of the checkpoint, for errors.

    Raises:
        UserError: the model is neither a Llama nor a Mistral.
    """
    saved = vars(arguments)
    for name, only in FIXED_ARGUMENTS.items():
        value = saved.get(name, only)
        plain = value is None or isinstance(value, bool | int | float | str | list | tuple)
        if not plain or (value != only and (value or only)):  # None, False and 0 mean the same
            raise UserError(
                f"{where}: {name} {brief(value)} has no counterpart in Hugging Face's Llama and "
                f"Mistral, which have {only!r}"
            )
    try:
        m = msgspec.convert(saved, MegatronArguments)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: its arguments: {error}") from error
    if m.window_size is not None and (m.window_size[0] < 0 or m.window_size[1] > 0):
        raise UserError(
            f"{where}: window_size {m.window_size} is not a window of tokens before a query"
        )
    groups = m.num_query_groups if m.group_query_attention else None
    return _computable(
        Architecture(
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
        ),
        where,
    )
