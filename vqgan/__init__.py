"""Stage 1: the tokenizer, its quantizers and losses, and the module that trains it."""
