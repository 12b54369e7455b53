"""The scores of ADM's evaluator, which tables of generated images are made with, in PyTorch."""
