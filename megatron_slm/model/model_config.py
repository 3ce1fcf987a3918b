"""Make a model's configuration, and a rank's part of the model, from Megatron's arguments.

With --hybrid-layer-pattern the model is Megatron's HybridModel, and otherwise its GPTModel.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from megatron_slm.model.hybrid_layers import plain_hybrid_stack
from megatron_slm.model.layer_spec import plain_block_spec
from megatron_slm.model.output_processor import take_output_processor


def installed_layers() -> Callable[..., Any] | None:
    """Return the layers to build: None, for Megatron's choice, if Transformer Engine is installed;
    otherwise those of plain torch."""
    return None if HAVE_TE else plain_block_spec


def model_config(args: Namespace, layer_spec: Callable[..., Any] | None) -> Any:
    """Return Megatron's GPTModelConfig or HybridModelConfig.

    Args:
        args: Megatron's arguments.
        layer_spec: function that returns a GPT's layers for a GPTModelConfig and a vp_stage, in
            place of which a hybrid model gets its own plain layers; None for Megatron's choice.
            --spec takes precedence over both.
    """
    replaced = layer_spec is not None and args.spec is None
    if args.hybrid_layer_pattern is not None:
        model = hybrid_config_from_args(args)
        if replaced:
            model.hybrid_stack_spec = plain_hybrid_stack(model)
        return model
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if replaced:
        model.transformer_layer_spec = layer_spec
    return model


def build_stage(
    args: Namespace,
    layer_spec: Callable[..., Any] | None,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
) -> LanguageModule:
    """Build this rank's part of a model, which takes an `output_processor`.

    Args:
        args: Megatron's arguments.
        layer_spec: as for model_config.
        first: whether this is the first of all pipeline stages, which has the embedding.
        last: whether this is the last of all pipeline stages, which has the output layer.
        vp_stage: number of the virtual stage, from 0; None if each rank has a single stage.
    """
    settings = model_config(args, layer_spec)
    settings.finalize()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model: LanguageModule = settings.get_builder_cls()(settings).build_model(
        groups, pre_process=first, post_process=last, vp_stage=vp_stage
    )
    take_output_processor(model)
    return model
