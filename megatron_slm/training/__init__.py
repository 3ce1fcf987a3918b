"""Selective language modeling inside `megatron.training`: arguments, steps, hooks."""
