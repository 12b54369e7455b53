"""Encoders and decoders: the contract, and one file per architecture."""
