"""Grow, don't overwrite: fine-tuning without forgetting, by growing the MLPs of a language model."""

__version__ = "0.1.0"
