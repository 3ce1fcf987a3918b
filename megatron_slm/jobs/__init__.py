"""Jobs that score with a model instead of training it, started by torchrun."""
