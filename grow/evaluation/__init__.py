"""Scores a checkpoint on its task and on retention, at any interpolation coefficient α."""
