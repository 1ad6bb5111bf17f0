"""What a checkpoint can do and what it still knows, over the dial."""
