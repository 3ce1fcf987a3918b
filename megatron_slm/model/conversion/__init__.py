"""Convert models between Hugging Face safetensors and Megatron checkpoints."""
