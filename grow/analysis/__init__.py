"""Analysis of weight updates: which layers training moves, and in how many directions."""
