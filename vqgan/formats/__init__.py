"""Public tokenizers: how their files are read, one file per format."""
