"""One file per discriminator."""
