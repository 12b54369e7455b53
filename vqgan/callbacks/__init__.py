"""What happens around the training step of stage 1."""
