"""A checkpoint saved without Transformer Engine, made loadable with it."""

from __future__ import annotations

from pathlib import Path

from megatron_slm.model.tensors import QKV, extra_states
from megatron_slm.model.torch_dist import NO_EXTRA_STATE, TorchDistReader, add_objects


def complete(directory: Path) -> int:
    """Add the extra states, empty, that Transformer Engine's layers ask for and others do not save.

    Returns:
        how many were added.

    Raises:
        UserError: no torch_dist checkpoint, or one of other layers.
    """
    reader = TorchDistReader(directory)
    layers = reader.tensor(f"decoder.layers.{QKV}").size[0]
    missing = [
        name for name in extra_states(layers) if name not in reader.table.state_dict_metadata
    ]
    if missing:
        add_objects(directory, "__extra_0.distcp", dict.fromkeys(missing, NO_EXTRA_STATE))
    return len(missing)
