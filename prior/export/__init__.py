"""stage=export of a prior: beside its tokenizer, in the same formats."""
