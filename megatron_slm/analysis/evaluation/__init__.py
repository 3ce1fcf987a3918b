"""Evaluate a checkpoint on few-shot benchmarks with lm-eval."""
