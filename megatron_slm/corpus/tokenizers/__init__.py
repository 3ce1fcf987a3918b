"""Read tokenizer files, and choose the engines that turn texts into token ids."""
