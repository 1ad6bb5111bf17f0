"""Fits switches (grow.model.switch): on which rows, with which detector, with which promise."""
