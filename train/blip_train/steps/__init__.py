"""What one batch of each task computes."""
