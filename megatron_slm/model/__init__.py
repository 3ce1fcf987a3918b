"""Building the layers of policy and reference."""

from megatron_slm.model.layer_spec import plain_block_spec

__all__ = ["plain_block_spec"]
