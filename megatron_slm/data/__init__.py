"""Text and token files: what training reads and the tools that make it."""
