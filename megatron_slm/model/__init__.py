"""Build the layers of policy and reference, and read and write their checkpoints."""
