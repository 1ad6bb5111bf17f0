"""From the rows of a data set to text, tokens with labels, and packed sequences."""
