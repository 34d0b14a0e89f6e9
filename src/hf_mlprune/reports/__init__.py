"""What a model has left, how fast it is, and its card."""
