"""The configs; a package only so that an installed Codegrid finds them."""
