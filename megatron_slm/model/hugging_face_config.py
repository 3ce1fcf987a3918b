"""Read a Llama's or Mistral's config.json into types, as transformers 5 understands it.

Where keys disagree or one is missing, the value is the one that transformers uses.  An option that
Megatron cannot compute is refused by name.
"""

from __future__ import annotations

from reprlib import repr as brief
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta

from megatron_slm.errors import UserError

Size = Annotated[int, Meta(ge=1, lt=2**31)]
Layers = Annotated[int, Meta(ge=1, le=10_000)]  # bounds the memory for tables of all tensors
Positive = Annotated[float, Meta(gt=0, lt=1e15)]

# Keys of config.json that change what is computed or which weights are read, with the only value
# that is supported.
FIXED_KEYS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "per_layer_config": None,
    "transformers_weights": None,
}

# Special tokens, with the ids that transformers uses if config.json does not have them.
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}

# These values are built into Megatron's rotary embedding.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class LlamaConfig(msgspec.Struct):
    """A Llama's config.json; the defaults are those of transformers."""

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
        """Number of tokens that a query sees, itself included; None for all before it."""
        return None


class MistralConfig(LlamaConfig):
    """A Mistral's config.json."""

    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 4096 * 32
    sliding_window: Size | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window


CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig}


def typed_config(config: dict[str, Any], where: str) -> LlamaConfig:
    """Check a config.json and convert it to types.

    Args:
        config: content of the file.
        where: path of the file, for errors.

    Raises:
        UserError: the model has another architecture or an option that Megatron cannot compute, or
            a key is missing or has the wrong type.
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
    """Return the base of the rotary embedding and the factor of Llama 3's scaling, None without it.

    Different versions of transformers write different keys; they are read in the order of
    precedence of transformers 5.

    Raises:
        UserError: the model has another kind of rotary embedding, or a value is not supported.
    """
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
            f"{where}: factor {brief(found.get('factor'))} of the llama3 rope is not positive"
        ) from error


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
