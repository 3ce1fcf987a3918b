"""Selective Language Modeling (Rho-1, arXiv 2404.07965) for Megatron."""

__version__ = "0.1.0"
