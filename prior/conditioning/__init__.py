"""What a prior is conditioned on beside classes: vectors of numbers, and the codes of another image."""
