"""Which layers move in training, and in how many directions."""
