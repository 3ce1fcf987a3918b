"""What a Llama's or Mistral's config.json says, in types, as transformers 5 understands it.

Where keys disagree, and where one is missing, the value is the one that transformers takes; what
Megatron cannot compute is refused by name.
"""

from __future__ import annotations

from reprlib import repr as brief
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from megatron_slm.errors import UserError

Size = Annotated[int, Meta(ge=1, lt=2**31)]
Layers = Annotated[int, Meta(ge=1, le=10_000)]  # tables of all their tensors are made
Positive = Annotated[float, Meta(gt=0, lt=1e15)]

# What config.json can vary, and change by it what is computed or which weights are read.
FIXED_KEYS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "per_layer_config": None,
    "transformers_weights": None,
}

# Special tokens, with the ids that transformers takes where config.json is silent.
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}

# Megatron's rotary embedding has these built in.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class LlamaConfig(msgspec.Struct):
    """What config.json says of a Llama, with the values that transformers takes where it is
    silent."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    vocab_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 2048
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = SPECIAL_IDS["bos_token_id"]
    eos_token_id: int | list[int] | None = SPECIAL_IDS["eos_token_id"]
    pad_token_id: int | None = SPECIAL_IDS["pad_token_id"]
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Any = 10000.0
    partial_rotary_factor: Any = None
    original_max_position_embeddings: Any = UNSET

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included."""
        return None


class MistralConfig(LlamaConfig):
    """The same of a Mistral."""

    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 4096 * 32
    sliding_window: Size | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window


CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}


def typed_config(config: dict[str, Any], where: str) -> LlamaConfig:
    """Check a config.json and give its values types.

    Args:
        where: the file, for errors.

    Raises:
        UserError: another architecture, an option that Megatron cannot compute, a key that is
            missing or of another type.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in CONFIGS:
        raise UserError(
            f"{where}: model_type {brief(family)} is not supported, only {' and '.join(CONFIGS)}"
        )
    for name, only in FIXED_KEYS.items():
        if config.get(name, only) != only:
            raise UserError(
                f"{where}: {name} {brief(config[name])} is not supported, only {only!r}"
            )
    try:
        c = msgspec.convert(config, CONFIGS[family])
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}") from error
    kind = "full_attention" if c.window is None else "sliding_attention"
    if set(c.layer_types or [kind]) != {kind}:
        raise UserError(
            f"{where}: layer_types {brief(c.layer_types)} are not supported: with sliding_window "
            f"{c.window} all layers of a {family} are {kind}"
        )
    return c


def rope(c: LlamaConfig, where: str) -> tuple[int, float | None]:
    """Return the base and the factor of Llama 3's scaling, by the order in which transformers 5
    takes the keys that it and its older versions write."""
    found = c.rope_scaling or c.rope_parameters or {}
    kind = found.get("rope_type", found.get("type", "default"))
    base = rope_base(found.get("rope_theta", c.rope_theta), where)
    part = found.get("partial_rotary_factor", c.partial_rotary_factor)
    if part is not None and part != 1:
        raise UserError(f"{where}: partial_rotary_factor {brief(part)} is not supported, only 1")
    if any(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{where}: rope parameters {brief(found)} of some layers are not supported")
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UserError(
            f"{where}: rope type {brief(kind)} is not supported, only default and llama3"
        )
    original = "original_max_position_embeddings"
    found = {original: c.max_position_embeddings} | found
    if c.original_max_position_embeddings is not UNSET:
        found[original] = c.original_max_position_embeddings
    for name, value in LLAMA3_ROPE.items():
        if found.get(name) != value:
            raise UserError(
                f"{where}: {name} {brief(found.get(name))} of the llama3 rope is not supported: "
                f"Megatron's is {value}"
            )
    try:
        return base, msgspec.convert(found.get("factor"), Positive)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{where}: factor {brief(found.get('factor'))} of the llama3 rope is no positive number"
        ) from error


def rope_base(theta: Any, where: str) -> int:
    """Return a base of the rotary embedding, which Megatron has as a positive integer.

    Raises:
        UserError: it is none.
    """
    try:
        if msgspec.convert(theta, Positive) == int(theta):
            return int(theta)
    except msgspec.ValidationError:
        pass
    raise UserError(
        f"{where}: rope_theta {brief(theta)} is not supported: Megatron's is a positive integer"
    )
