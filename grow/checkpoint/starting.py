"""Checks of a checkpoint to start from: its weights must not be quantized, and a head of its own must match its config.

Some savers write tied embeddings under both of their names, and the config says that they are one. transformers ties
them if they are equal and keeps them apart if not; other tools go by the config alone.
"""

from typing import Any

from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.writer import equal
from grow.errors import UserError
from grow.names import canonical
from grow.plan import text_config


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Says whether a config ties the head to the embeddings, as transformers reads it: by its top level alone. If the
    field is left out, the class's default holds, which is to tie them for Gemma."""
    said = config.get("tie_word_embeddings")
    return bool(said) if said is not None else str(config.get("model_type", "")).startswith("gemma")


def second_head(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Returns the names of the head and of the embeddings if both are in the files and the config ties them; else
    None."""
    names = {canonical(name): name for name in checkpoint.tensors}
    head, embeddings = names.get("lm_head.weight"), names.get("embed_tokens.weight")
    return (head, embeddings) if head and embeddings and ties_embeddings(checkpoint.config) else None


def check_start(checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint whose weights are quantized, or whose head and embeddings differ though its
    config ties them. Both are read whole where both are there."""
    check_not_quantized(checkpoint)
    names = second_head(checkpoint)
    if names is None:
        return
    head, embeddings = (checkpoint.lazy(name) for name in names)
    if (head.shape, head.dtype) != (embeddings.shape, embeddings.dtype) or not equal(head, embeddings):
        raise UserError(
            f"{checkpoint.path}: its config ties head and embeddings, and {names[0]} differs from {names[1]}: set "
            "tie_word_embeddings to false at the top of its config.json, or take the head out of its files"
        )


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint whose config says that its weights are quantized."""
    if checkpoint.config.get("quantization_config") or text_config(checkpoint.config).get("quantization_config"):
        raise UserError(f"{checkpoint.path}: its weights are quantized; give the checkpoint in bf16, fp16 or fp32")
