"""Divide a token budget among datasets."""
