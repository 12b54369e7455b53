"""What happens around the training step, whatever is trained."""
