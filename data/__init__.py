"""Images and codes: datasets and datamodules. Knows nothing of models."""
