"""A GPT's configuration from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args

from megatron_slm.model.layer_spec import plain_block_spec


def installed_layers() -> Callable[..., Any] | None:
    """Return None, for Megatron's choice of layers, where Transformer Engine is installed, and the
    layers of plain torch elsewhere."""
    return None if HAVE_TE else plain_block_spec


def gpt_config(
    args: Namespace,
    layer_spec: Callable[..., Any] | None,
    config: TransformerConfig | None = None,
) -> Any:
    """Megatron's GPTModelConfig.

    Args:
        layer_spec: layers of a (GPTModelConfig, vp_stage), None for Megatron's choice; --spec
            comes before either.
    """
    model = gpt_config_from_args(args, config)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if layer_spec is not None and args.spec is None:
        model.transformer_layer_spec = layer_spec
    return model
