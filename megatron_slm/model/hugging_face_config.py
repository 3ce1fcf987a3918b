"""Read a config.json as transformers 5 understands it, and write one.

Where keys disagree or one is missing, the value is the one that transformers uses.  An option that
Megatron cannot compute is refused by name.
"""

from __future__ import annotations

from reprlib import repr as brief
from typing import Any

import msgspec
from msgspec import UNSET

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, check_sizes, rope_base
from megatron_slm.model.families import (
    FAMILIES,
    FULL,
    LACKING,
    ONLY,
    SLIDING,
    LlamaConfig,
)
from megatron_slm.model.numbers import Positive

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# These values are built into Megatron's rotary embedding.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def from_hugging_face(config: dict[str, Any], where: str) -> Architecture:
    """Read the architecture from a config.json.

    Args:
        config: content of the file.
        where: path of the file, for errors.

    Raises:
        UserError: the model has another architecture, or an option that Megatron cannot compute.
    """
    c = typed_config(config, where)
    theta, scaling = _rope(c, where)
    architecture = Architecture(
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
        experts=c.experts,
        **dict.fromkeys(FAMILIES[config["model_type"]].has, True),
    )
    check_sizes(architecture, where)
    return architecture


def to_hugging_face(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Return a config.json that versions 4 and 5 of transformers read.

    Args:
        architecture: the model.
        dtype: torch's name of the weights' type, such as bfloat16.

    Raises:
        UserError: no family has models of this architecture.
    """
    a = architecture
    family = FAMILIES[a.family]
    config = {
        "architectures": [family.causal_lm],
        "model_type": a.family,
        "hidden_act": "silu",
        "hidden_size": a.hidden,
        "intermediate_size": a.ffn,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.groups,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": a.positions,
        "rms_norm_eps": a.epsilon,
        "rope_theta": float(a.rope_theta),
        "rope_scaling": None,
        "tie_word_embeddings": a.tied,
        "torch_dtype": dtype,
    }
    if family.head_dim or a.head_dim * a.heads != a.hidden:
        config["head_dim"] = a.head_dim
    if a.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": a.rope_scaling} | LLAMA3_ROPE
    if a.experts is not None:
        config |= family.config.expert_keys(a.experts)
    return config | family.config.window_keys(a.window)


def typed_config(config: dict[str, Any], where: str) -> LlamaConfig:
    """Check a config.json and convert it to types.

    Args:
        config: content of the file.
        where: path of the file, for errors.

    Raises:
        UserError: the model has another architecture or an option that Megatron cannot compute, or
            a key is missing or has the wrong type.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        why = LACKING.get(name) if isinstance(name, str) else None
        raise UserError(
            f"{where}: model_type {brief(name)} is not supported, only {', '.join(FAMILIES)}"
            + (f"; it has {why}, which are not converted" if why else "")
        )
    for key, only in (ONLY | family.only).items():
        if config.get(key, only) != only:
            raise UserError(f"{where}: {key} {brief(config[key])} is not supported, only {only!r}")
    try:
        c = msgspec.convert(config, family.config)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}") from error
    kind = FULL if c.window is None else SLIDING
    if set(c.kinds) != {kind} or len(c.kinds) != c.num_hidden_layers:
        raise UserError(
            f"{where}: layers with attention of the kinds {brief(c.kinds)} are not supported: with "
            f"a window of {c.window}, all {c.num_hidden_layers} have to be {kind}"
        )
    return c


def _rope(c: LlamaConfig, where: str) -> tuple[int, float | None]:
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
