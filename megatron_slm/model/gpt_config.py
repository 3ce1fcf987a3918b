"""Make a GPT's configuration from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args


def gpt_config(
    args: Namespace,
    layer_spec: Callable[..., Any] | None,
    config: TransformerConfig | None = None,
) -> Any:
    """Return Megatron's GPTModelConfig.

    Args:
        args: Megatron's arguments.
        layer_spec: function that returns the layers for a GPTModelConfig and a vp_stage; None for
            Megatron's choice. --spec takes precedence over both.
        config: configuration of the transformer; None to make it from the arguments.
    """
    model = gpt_config_from_args(args, config)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if layer_spec is not None and args.spec is None:
        model.transformer_layer_spec = layer_spec
    return model
