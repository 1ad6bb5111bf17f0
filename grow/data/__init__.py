"""Rows of a data set → text → tokens and labels → packed sequences."""
