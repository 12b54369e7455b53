"""Heads: from what a network computed at a position to the distribution of the code there."""
