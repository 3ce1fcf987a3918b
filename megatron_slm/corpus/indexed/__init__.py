"""Write, merge and verify Megatron's indexed datasets."""
