"""Checkpoints, offline: nothing here builds a model or imports transformers or deepspeed; it runs on a login node."""
