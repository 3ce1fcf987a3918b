"""Make a GPT's configuration, and a rank's part of the model, from Megatron's arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

from megatron_slm.model.layer_spec import plain_block_spec


def installed_layers() -> Callable[..., Any] | None:
    """Return the layers to build: None, for Megatron's choice, if Transformer Engine is installed;
    otherwise those of plain torch."""
    return None if HAVE_TE else plain_block_spec


def gpt_config(args: Namespace, layer_spec: Callable[..., Any] | None) -> Any:
    """Return Megatron's GPTModelConfig.

    Args:
        args: Megatron's arguments.
        layer_spec: function that returns the layers for a GPTModelConfig and a vp_stage; None for
            Megatron's choice. --spec takes precedence over both.
    """
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if layer_spec is not None and args.spec is None:
        model.transformer_layer_spec = layer_spec
    return model


def build_gpt(
    args: Namespace,
    layer_spec: Callable[..., Any] | None,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this rank's part of a GPT.

    Args:
        args: Megatron's arguments.
        layer_spec: as for gpt_config.
        first: whether this is the first of all pipeline stages, which has the embedding.
        last: whether this is the last of all pipeline stages, which has the output layer.
        vp_stage: number of the virtual stage, from 0; None if each rank has a single stage.
    """
    settings = gpt_config(args, layer_spec)
    settings.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return GPTModelBuilder(settings).build_model(
        groups, pre_process=first, post_process=last, vp_stage=vp_stage
    )
