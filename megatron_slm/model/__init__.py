"""GPT models for policy and reference."""
