"""One training run: from a recipe to what trained, and everything that watches over it."""
