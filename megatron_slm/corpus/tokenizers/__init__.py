"""Tokenizer files, and the engines that turn texts into token ids."""
