"""Check the type and range of a checkpoint's arguments before anything uses them.

A string in place of a number or a Boolean ("false" counts as true) would build another model.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

_Size = Annotated[int, Meta(ge=1, lt=1 << 31)]
_Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
_Layers = Annotated[int, Meta(ge=1, le=10_000)]
_Number = Annotated[float, Meta(ge=-1e12, le=1e12)]
_Positive = Annotated[float, Meta(gt=0.0, le=1e12)]
_Text = Annotated[str, Meta(max_length=10_000)]

NEWEST = 3.0  # newest version of checkpoints that Megatron 0.19 reads

# Every checkpoint of a GPT has these, whatever version of Megatron wrote it.
REQUIRED: list[tuple[Any, str]] = [
    (_Layers, "num_layers"),
    (
        _Size,
        "hidden_size ffn_hidden_size num_attention_heads max_position_embeddings padded_vocab_size",
    ),
    (bool, "untie_embeddings_and_output_weights"),
]
# Some checkpoints have these.
KNOWN_ARGUMENTS: list[tuple[Any, str]] = [
    (
        bool | None,
        """
        group_query_attention add_position_embedding use_rotary_position_embeddings
        rotary_interleaved use_rope_scaling yarn_correction_range_round_to_int add_bias_linear
        add_qkv_bias swiglu squared_relu quick_geglu openai_gelu layernorm_zero_centered_gamma
        apply_layernorm_1p apply_residual_connection_post_layernorm apply_query_key_layer_scaling
        qk_layernorm qk_l2_norm attention_output_gate use_mup multi_latent_attention no_save_optim
        no_save_rng use_distributed_optimizer slm_selects
        """,
    ),
    (
        _Size | None,
        """
        num_query_groups kv_channels yarn_original_max_position_embeddings
        tensor_model_parallel_size pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size seq_length slm_vocab_size slm_model_vocab_size
        vocab_size global_batch_size
        """,
    ),
    (_Count | None, "eval_global_batch_size train_iters train_samples eval_interval"),
    (_Positive | None, "rotary_base rotary_percent layernorm_epsilon norm_epsilon"),
    (
        _Number | None,
        """
        rotary_seq_len_interpolation_factor rope_scaling_factor yarn_beta_fast yarn_beta_slow
        rotary_scaling_factor mscale mscale_all_dim glu_linear_offset activation_func_clamp_value
        mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
        mup_attn_scale_power
        """,
    ),
    (
        _Text | None,
        """
        position_embedding_type normalization softmax_type slm_model_type slm_tokenizer
        slm_reference_identity tokenizer_type tokenizer_model hybrid_layer_pattern
        """,
    ),
    (tuple[int, int] | None, "window_size"),
    (int | list[int] | str | None, "window_attn_skip_freq no_rope_freq"),
]
CHECKED = msgspec.defstruct(
    "CHECKED",
    [
        *((name, kind) for kind, names in REQUIRED for name in names.split()),
        *(
            (name, kind | UnsetType, UNSET)
            for kind, names in KNOWN_ARGUMENTS
            for name in names.split()
        ),
    ],
    kw_only=True,
)


class CommonState(msgspec.Struct):
    """What a checkpoint has besides tensors, as far as it is used."""

    args: Any
    iteration: _Count
    checkpoint_version: Annotated[float, Meta(ge=0.0, le=NEWEST)] = NEWEST
    content_metadata: dict[str, Any] | None = None


def check_common_state(found: Any) -> None:
    """Check what a checkpoint has besides tensors, above all its arguments.

    Raises:
        ValueError: something is missing, or has the wrong type or range; the message names it.
    """
    arguments = msgspec.convert(found, CommonState).args
    if not isinstance(arguments, Namespace):
        raise ValueError(f"{type(arguments).__name__} instead of arguments")
    msgspec.convert(
        {name: value for name, value in vars(arguments).items() if isinstance(name, str)}, CHECKED
    )
