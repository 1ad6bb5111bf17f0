"""Training methods: one file each, behind the interface of grow.methods.method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.trained_weights import Export
from grow.errors import UserError, unknown
from grow.methods.baselines.adapter import Adapter
from grow.methods.baselines.blocks import Blocks
from grow.methods.baselines.disel import Disel
from grow.methods.baselines.ewc import Ewc
from grow.methods.baselines.finch import Finch
from grow.methods.baselines.flow import Flow
from grow.methods.baselines.osf import Osf
from grow.methods.baselines.stm import Stm
from grow.methods.g_freeze import GFreeze
from grow.methods.g_lora import GLora
from grow.methods.g_train import GTrain
from grow.methods.lora import Lora
from grow.methods.method import Method
from grow.methods.sft import Sft
from grow.recipe import Recipe
from grow.recipe_file import parse_recipe, recipe_of_run

METHODS: dict[str, type[Method]] = {
    "g_freeze": GFreeze,
    "g_train": GTrain,
    "g_lora": GLora,
    "sft": Sft,
    "lora": Lora,
    "adapter": Adapter,
    "blocks": Blocks,
    "disel": Disel,
    "ewc": Ewc,
    "finch": Finch,
    "flow": Flow,
    "osf": Osf,
    "stm": Stm,
}


def read_recipe(path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe, or that of the run that has begun in a folder, and replaces fields by the overrides. Raises
    UserError for any mistake in either."""
    read = recipe_of_run if Path(path).is_dir() else parse_recipe
    return read(path, overrides or {}, METHODS)


def export_trained(recipe: Mapping[str, Any], dtype: str, start: Checkpoint, trained: dict[str, LazyTensor]) -> Export:
    """Turns what a run trained into tensors of a checkpoint, as its method does it; `recipe` is that of its run.json.

    Raises UserError for a method that is not known, or that cannot be exported.
    """
    name = str(recipe["method"])
    if name not in METHODS:
        raise UserError(unknown(name, METHODS, "method"))
    return METHODS[name].from_values(dict(recipe)).export(start, trained, dtype)
