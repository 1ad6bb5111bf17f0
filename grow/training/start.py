"""The checkpoint that a run starts from."""

from pathlib import Path

from grow.checkpoint.hub import locate
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import check_start
from grow.errors import UserError
from grow.names import is_growth
from grow.recipe import Recipe


def starting_checkpoint(recipe: Recipe) -> Checkpoint:
    """The recipe's base, or `grown` for a method that grows. Raises UserError, which says how to make it, if it is not
    there or is the other of the two, or grew from another base."""
    grows = recipe.make_method().grows
    if grows and not Path(recipe.grown).is_dir():
        _base(recipe)
        raise UserError(
            f"{recipe.grown}: no grown checkpoint there; make it: "
            f"python -m grow expand {recipe.base_name} {recipe.grown}"
        )
    start = Checkpoint(recipe.grown if grows else _base(recipe))
    if grows != ("growth" in start.config):
        what = "is not grown; run python -m grow expand" if grows else "is grown already; give its base"
        raise UserError(f"{recipe.start}: {what}")
    check_start(start)
    if grows and _is_another(start, recipe.base_name):
        raise UserError(f"{recipe.grown}: did not grow from {recipe.base_name}; give `grown` a folder for each base")
    return start


def _is_another(grown: Checkpoint, path: str) -> bool:
    """Whether the base at this path, if there is one, is not the one inside: by the first row of every tensor, since to
    read all of both would take as long as to grow."""
    try:
        base = Checkpoint(path)
    except UserError:
        return False
    own = {name: info for name, info in grown.tensors.items() if not is_growth(name)}
    if own.keys() != base.tensors.keys():
        return True
    return any(
        (info.shape, info.dtype) != (base.tensors[name].shape, base.tensors[name].dtype)
        or (0 not in info.shape[:1] and _first_row(grown, name) != _first_row(base, name))
        for name, info in own.items()
    )


def _first_row(checkpoint: Checkpoint, name: str) -> bytes:
    return checkpoint.lazy(name).rows(0, 1).tobytes()


def _base(recipe: Recipe) -> Path:
    """The base's folder. Raises UserError, which says how to get it, if it is not here."""
    try:
        return locate(recipe.base_name)
    except UserError:
        if "gemma3_270m" not in recipe.base:
            raise
        raise UserError(
            f"{recipe.base_name}: no checkpoint there; python recipes/gemma3_270m/fetch.py brings it"
        ) from None
