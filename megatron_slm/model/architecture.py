"""What shapes a Llama or Mistral: from and to Hugging Face's config.json and Megatron's arguments.

Llama 1 to 3, TinyLlama and Mistral are one architecture here: RMSNorm, rotary embeddings, grouped
queries, SwiGLU, no biases.  Mistral differs by its sliding window, which not all of them have.
Whatever either side can say beyond that, and changes what is computed, is refused by name.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_slm.errors import UserError

# Keys that config.json may leave out, with the values that transformers then takes.
HUGGING_FACE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
}
CAUSAL_LM = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Megatron's rotary embedding has these built in.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What Megatron can vary and this architecture does not.
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

# What shapes the model and Megatron's --use-checkpoint-args does not take from a checkpoint.
NOT_TAKEN_BY_MEGATRON = (
    "layernorm_epsilon",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
)


@dataclass(frozen=True)
class Architecture:
    """groups: key-value heads.  vocabulary: rows of the embedding that are tokens.
    rope_scaling: the factor of Llama 3's scaling; None without it.
    window: tokens a query sees, itself included; None for all before it.
    model_type: what it was called in a config.json; Llama and Mistral without a window are one.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_theta: int
    rope_scaling: float | None
    window: int | None
    tied: bool
    model_type: str = "llama"

    @property
    def family(self) -> str:
        """The model type that transformers computes it with: windows are Mistral's."""
        return self.model_type if self.window is None else "mistral"


def from_hugging_face(config: dict[str, Any], where: str) -> Architecture:
    """Read a config.json.

    Args:
        where: the file, for errors.

    Raises:
        UserError: another architecture, or an option of it that Megatron cannot compute.
    """
    family = config.get("model_type")
    if family not in HUGGING_FACE_DEFAULTS:
        raise UserError(
            f"{where}: model_type {family!r} is not supported, only "
            f"{' and '.join(HUGGING_FACE_DEFAULTS)}"
        )
    for name, only in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        if config.get(name, only) != only:
            raise UserError(f"{where}: {name} {config[name]!r} is not supported, only {only!r}")
    config = HUGGING_FACE_DEFAULTS[family] | config

    def number(name: str, otherwise: Any = None, kind: Any = int) -> Any:
        """A positive number of that kind; `otherwise` where config.json has none or null."""
        value = config.get(name)
        value = otherwise if value is None else value
        if not _positive(value, kind):
            raise UserError(
                f"{where} has no {name!r}"
                if value is None
                else f"{where}: {name} {value!r} is no positive number, or no whole one"
            )
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    theta, scaling = _rope(config, where)
    windowed = family == "mistral" and config["sliding_window"] is not None
    return Architecture(
        layers=number("num_hidden_layers"),
        hidden=hidden,
        ffn=number("intermediate_size"),
        heads=heads,
        groups=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocabulary=number("vocab_size"),
        positions=number("max_position_embeddings"),
        epsilon=number("rms_norm_eps", 1e-6, int | float),
        rope_theta=theta,
        rope_scaling=scaling,
        window=number("sliding_window") if windowed else None,
        tied=bool(config.get("tie_word_embeddings")),
        model_type=family,
    )


def _positive(value: Any, kind: Any = int | float) -> bool:
    """Whether it is a number of that kind, finite and above 0; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def _rope(config: dict[str, Any], where: str) -> tuple[int, float | None]:
    """Base and Llama-3 scaling factor, as transformers before and since version 5 write them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope parameters {rope!r} are not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not _positive(theta) or theta != int(theta):
        raise UserError(
            f"{where}: rope_theta {theta} is not supported: Megatron's is a positive integer"
        )
    if kind == "default":
        return int(theta), None
    if kind != "llama3":
        raise UserError(f"{where}: rope type {kind!r} is not supported, only default and llama3")
    for name, value in LLAMA3_ROPE.items():
        if rope.get(name) != value:
            raise UserError(
                f"{where}: {name} {rope.get(name)} of the llama3 rope is not supported: "
                f"Megatron's is {value}"
            )
    if not _positive(rope.get("factor")):
        raise UserError(
            f"{where}: factor {rope.get('factor')} of the llama3 rope is no positive number"
        )
    return int(theta), float(rope["factor"])


def to_hugging_face(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """A config.json that transformers reads in versions 4 and 5."""
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
        config["sliding_window"] = a.window  # without it transformers takes 4096
    return config


def vocabulary_of(arguments: Namespace) -> int | None:
    """Tokens of the model in a checkpoint, without padding, from its arguments: the model's that it
    was trained from, those of its tokenizer, or what import wrote.  None where they do not say."""
    for name in ("slm_model_vocab_size", "slm_vocab_size", "vocab_size"):
        found: int | None = getattr(arguments, name, None)
        if found is not None:
            return found
    return None


def to_megatron(architecture: Architecture) -> dict[str, Any]:
    """Megatron's arguments by the names they have in a checkpoint."""
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
    """Read the arguments in a checkpoint.

    Args:
        vocabulary: number of tokens, without padding.
        where: the checkpoint, for errors.

    Raises:
        UserError: a model that is no Llama or Mistral.
    """
    saved = vars(arguments)
    for name, only in FIXED_ARGUMENTS.items():
        value = saved.get(name, only)
        if value != only and (value or only):  # None, False and 0 mean the same
            raise UserError(
                f"{where}: {name} {value!r} has no counterpart in Hugging Face's Llama and "
                f"Mistral, which have {only!r}"
            )
    heads = saved["num_attention_heads"]
    window = saved.get("window_size")
    if window is not None and (window[0] < 0 or window[1] > 0):
        raise UserError(f"{where}: window_size {window} is not a window of tokens before a query")
    return Architecture(
        layers=saved["num_layers"],
        hidden=saved["hidden_size"],
        ffn=saved["ffn_hidden_size"],
        heads=heads,
        groups=saved["num_query_groups"] if saved["group_query_attention"] else heads,
        head_dim=saved["kv_channels"],
        vocabulary=vocabulary,
        positions=saved["max_position_embeddings"],
        epsilon=saved["layernorm_epsilon"],
        rope_theta=saved["rotary_base"],
        rope_scaling=saved["rope_scaling_factor"] if saved.get("use_rope_scaling") else None,
        window=None if window is None else window[0] + 1,
        tied=not saved["untie_embeddings_and_output_weights"],
        model_type=saved.get("slm_model_type") or "llama",
    )
