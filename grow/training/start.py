"""The checkpoint that a run starts from."""

from pathlib import Path

from grow.checkpoint.hub import locate
from grow.checkpoint.shards import Checkpoint
from grow.errors import UserError
from grow.recipe import Recipe


def starting_checkpoint(recipe: Recipe) -> Checkpoint:
    """The recipe's base, or `grown` for a method that grows. Raises UserError, which says how to make it, if it is not
    there or is the other of the two."""
    grows = recipe.make_method().grows
    if grows and not Path(recipe.grown).is_dir():
        _base(recipe)
        raise UserError(
            f"{recipe.grown}: no grown checkpoint there; make it: python -m grow expand {recipe.base} {recipe.grown}"
        )
    start = Checkpoint(recipe.grown if grows else _base(recipe))
    if grows != ("growth" in start.config):
        what = "is not grown; run python -m grow expand" if grows else "is grown already; give its base"
        raise UserError(f"{recipe.start}: {what}")
    return start


def _base(recipe: Recipe) -> Path:
    """The base's folder. Raises UserError, which says how to get it, if it is not here."""
    try:
        return locate(recipe.base)
    except UserError:
        if "gemma3_270m" not in recipe.base:
            raise
        raise UserError(f"{recipe.base}: no checkpoint there; python recipes/gemma3_270m/fetch.py brings it") from None
