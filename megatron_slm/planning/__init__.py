"""What a run will take before it is started: memory, FLOPs, time."""
