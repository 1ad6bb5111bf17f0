"""All that can grow in a model, put there by a plan and found again."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from grow.errors import UserError
from grow.model.attention_heads import grow_attention
from grow.model.layouts import decoder_mlps, has_matrix, modules_of
from grow.model.matrix import GrownMatrix, grow_matrix
from grow.model.mlp import GrownMLP, grow_mlp
from grow.parts import PARTS, parts_of
from grow.parts.part import Part
from grow.plan import GrowthPlan

_GROW = {"units": grow_mlp, "heads": grow_attention, "matrix": grow_matrix}


def add_parts(model: nn.Module, plan: GrowthPlan) -> None:
    """Gives a model whatever a plan says, uninitialised, in place: a checkpoint's loader fills it. Raises UserError
    where it does not fit."""
    for part, modules in planned_parts(model, plan):
        for layer, module in modules.items():
            _GROW[part.made_of](module, plan.factor, plan.trained_up)
            module.own_alpha = plan.own_alpha(part.name, layer)


def planned_parts(model: nn.Module, plan: GrowthPlan, whose: str = "") -> Iterator[tuple[Part, dict[int, Any]]]:
    """Yields the modules that grow by a plan, by kind of part and layer, each with the layout of what grows. Raises
    UserError, after the words of `whose`, for what the model does not have."""
    for part, where in parts_of(plan):
        there = modules_of(model, part)
        missing = sorted(set(where.layers) - set(there))
        if missing:
            what = part.name + f" of layers {missing}" * part.has_layers
            raise UserError(f"{whose}growth of the {what} does not fit the model, which has {sorted(there)}")
        for layer in where.layers:
            there[layer].__dict__["layout"] = part.matrices(has_matrix(there[layer]), where.kind)
        yield part, {layer: there[layer] for layer in where.layers}


def grown_mlps(model: nn.Module) -> Iterator[Any]:
    """Returns the grown MLPs of a model's decoder layers, lowest first; none if none has grown."""
    return (mlp for mlp in decoder_mlps(model).values() if isinstance(mlp, GrownMLP))


def grown_parts(model: nn.Module) -> Iterator[Any]:
    """Returns all that has grown, by the order of grow.parts and layer by layer."""
    there = (part for kind in PARTS.values() for part in modules_of(model, kind).values())
    return (part for part in there if isinstance(part, (GrownMLP, GrownMatrix)))


def grown_units(model: nn.Module) -> Iterator[Any]:
    """Returns all that has grown and maps to units, or heads, and back."""
    return (part for part in grown_parts(model) if isinstance(part, GrownMLP))


def parts_with_alpha(model: nn.Module) -> Iterator[Any]:
    """Returns the parts that have an interpolation coefficient of their own: those that have grown, or were adapted."""
    # By class: a branch has what the module has that it is of. In one pass, since each look at the base makes one.
    return (part for part in model.modules() if hasattr(type(part), "own_alpha"))


def grown_beside_text(model: nn.Module) -> bool:
    """Says whether something of a tower for images, or what leads from it, has grown, which text does not show."""
    beside = (part for part in PARTS.values() if part.of_images)
    return any(hasattr(module, "own_alpha") for part in beside for module in modules_of(model, part).values())
