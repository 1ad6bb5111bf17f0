"""Finds the checkpoint that a run starts from, and checks it."""

import dataclasses
from math import prod
from pathlib import Path
from shlex import quote

from grow.checkpoint.expand import expand
from grow.checkpoint.growable import make_plan, plan_of
from grow.checkpoint.hub import locate
from grow.checkpoint.output import Progress, no_progress
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import check_start
from grow.errors import UserError
from grow.methods.rates import default_rate
from grow.names import is_growth
from grow.parts import growing, parts_of
from grow.parts.part import Part
from grow.plan import GrowthPlan
from grow.recipe import Recipe
from grow.recipe_values import begun_with


def starting_checkpoint(recipe: Recipe) -> Checkpoint:
    """Returns the recipe's base, or `grown` for a method that grows. Raises UserError, which says how to make it, if it
    is not there, is the other of the two, or grew from another base."""
    grows = recipe.make_method().grows
    if grows and not Path(recipe.grown).is_dir():
        _base(recipe)
        how = f"grow expand {quote(recipe.base_name)} {quote(recipe.grown)}"
        if recipe.makes_grown or recipe.plans_growth:
            how = "launch/train.sh does, or: " * recipe.makes_grown + f"{how} {' '.join(recipe.growth_flags)}"
        raise UserError(f"{recipe.grown}: no grown checkpoint there; make it: {how}")
    start = Checkpoint(recipe.grown if grows else _base(recipe))
    if grows != ("growth" in start.config):
        what = "is not grown; run grow expand" if grows else "is grown already; give its base"
        raise UserError(f"{recipe.start}: {what}")
    check_start(start)
    if grows and _is_another(start, recipe.base_name):
        raise UserError(f"{recipe.grown}: did not grow from {recipe.base_name}; give `grown` a folder for each base")
    return start


def planned_start(recipe: Recipe) -> Checkpoint:
    """Returns the starting checkpoint; or, if a run is to make its own grown one and has not yet, the base that will
    grow.

    Raises UserError as starting_checkpoint does, and for a base that cannot grow.
    """
    if not recipe.makes_grown or Path(recipe.grown).is_dir():
        start = starting_checkpoint(recipe)
        _check_plan(recipe, start)
        return start
    base = Checkpoint(_base(recipe))
    make_plan(base, **recipe.growth)
    check_start(base)
    return base


def _check_plan(recipe: Recipe, grown: Checkpoint) -> None:
    """Raises UserError if a grown checkpoint is not the one that its recipe asks for.

    A recipe that leaves all of its growth to the defaults takes what is there: one that was named; or, in the run's
    folder, other layers or another factor, of which LAYERS and FACTOR may have told launch/expand.sh.
    """
    if not recipe.make_method().grows or not (recipe.plans_growth or recipe.makes_grown):
        return
    there = GrowthPlan.from_config(grown.config)
    wanted = plan_of(grown, **recipe.growth)
    if there is not None and not recipe.plans_growth:
        wanted = dataclasses.replace(wanted, layers=there.layers, factor=there.factor)
    if there is None or there.as_expanded() != wanted:
        asked = ", ".join(f"{name} {value}" for name, value in recipe.growth.items() if value)
        where = "another --output_dir" if recipe.makes_grown else "`grown` another folder"
        raise UserError(f"{recipe.grown}: has grown otherwise than {asked}; put these fields back, or give {where}")


def expand_start(recipe: Recipe, progress: Progress = no_progress) -> None:
    """Makes the grown checkpoint of a run that is to start from its own, unless it is there."""
    if recipe.makes_grown and not Path(recipe.grown).is_dir():
        expand(recipe.base_name, recipe.grown, progress=progress, **recipe.growth)


def with_learning_rate(recipe: Recipe) -> Recipe:
    """Returns the recipe with a rate: its own, that of the run that has begun, or the default for the base's size."""
    if recipe.learning_rate is not None:
        return recipe
    rate = begun_with(recipe.output_dir).get("learning_rate")
    if not isinstance(rate, float):
        base = Checkpoint(_base(recipe))
        size = sum(prod(info.shape) for info in base.tensors.values())
        parts = growing_parts(recipe)
        rate = default_rate(recipe.method, size, parts[0].rate if len(parts) == 1 else 1.0)
    return dataclasses.replace(recipe, learning_rate=rate)


def growing_parts(recipe: Recipe) -> list[Part]:
    """Returns which kinds of parts grow in a run: those of the grown checkpoint, or, before it is there, those that are
    asked for."""
    if not recipe.method_class.grows:
        return []
    there = GrowthPlan.from_config(Checkpoint(recipe.grown).config) if Path(recipe.grown).is_dir() else None
    if there:
        return [part for part, _ in parts_of(there)]
    return growing(recipe.growth)


def _is_another(grown: Checkpoint, path: str) -> bool:
    """Says whether the base at this path, if there is one, differs from the one inside. It compares the first row of
    every tensor, since reading all of both would take as long as growing."""
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
    """Returns the base's folder. Raises UserError, which says how to get it, if it is not here."""
    try:
        return locate(recipe.base_name)
    except UserError:
        if Path(recipe.base).parts[-2:] != ("gemma3_270m", "model"):
            raise
        raise UserError(
            f"{recipe.base_name}: no checkpoint there; python recipes/gemma3_270m/fetch.py brings it"
        ) from None
