"""Tell layers through which tokens the backward pass of a step goes (--slm-backward selected)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training import get_args

from megatron_slm.errors import UserError
from megatron_slm.model.selected_layers import SelectedLayer
from megatron_slm.training.settings import SelectiveSettings, Step


def prepare_layers(
    model: Sequence[torch.nn.Module], step: Step, settings: SelectiveSettings
) -> None:
    """Prepare a policy's layers for a step, if their backward passes are to cost what is selected.

    A step that trains on all tokens is exact, masked tokens included.  With thresholds carried from
    the steps before, no step does for certain.

    Raises:
        UserError: the model, which a script has built by itself, has other layers.
    """
    if get_args().slm_backward == "all":
        return
    modules = (module for chunk in model for module in chunk.modules())
    ratios = settings.selection.domain_ratios
    for layer in modules:
        if not isinstance(layer, TransformerLayer):
            continue
        if not isinstance(layer, SelectedLayer):
            raise UserError(
                "--slm-backward selected needs layers that this script's model does not have: "
                "build it from SelectiveTraining.model_config()"
            )
        layer.whole = not step.selects or (
            step.ratio == 1.0 and not ratios and step.thresholds is None
        )
