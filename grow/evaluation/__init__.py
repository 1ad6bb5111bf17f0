"""What a checkpoint can do and what it still knows, at any interpolation coefficient α."""
