"""Divide a token budget among datasets according to a recipe."""
