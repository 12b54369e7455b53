"""Stage 2: priors over the code grids of a tokenizer, and sampling from them."""
