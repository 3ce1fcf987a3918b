"""Building the layers of policy and reference; Hugging Face models to and from Megatron."""
