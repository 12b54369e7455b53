"""One file for each command of stage 2."""
