"""Training: a recipe is run, and its result is a folder (README.md)."""
