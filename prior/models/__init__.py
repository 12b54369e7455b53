"""One file per prior."""
