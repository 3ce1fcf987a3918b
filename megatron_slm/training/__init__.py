"""Selective language modeling inside `megatron.training`: arguments, forward step, step seam."""
