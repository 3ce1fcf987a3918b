"""The command line: every option, what is checked of it, and Megatron's parser behind it."""
