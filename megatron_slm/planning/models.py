"""Describe well-known architectures."""

from __future__ import annotations

from megatron_slm.model.architecture import Architecture

TINYLLAMA = Architecture(
    layers=22,
    hidden=2048,
    ffn=5632,
    heads=32,
    groups=4,
    head_dim=64,
    vocabulary=32000,
    positions=2048,
    epsilon=1e-5,
    rope_theta=10000,
    rope_scaling=None,
    window=None,
    tied=False,
)
