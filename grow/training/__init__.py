"""One training run, from a recipe to a folder (README.md)."""
