"""Scores of documents from outside Megatron: other models, servers, and files of values."""
