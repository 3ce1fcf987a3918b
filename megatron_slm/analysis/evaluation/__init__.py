"""Evaluate a checkpoint on few-shot benchmarks."""
