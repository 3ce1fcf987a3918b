"""Estimate what a run will take before it is started: memory, FLOPs and time."""
