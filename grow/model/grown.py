"""All that can grow in a model, put there by a plan and found again."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from grow.model.attention_heads import add_heads
from grow.model.layouts import decoder_attentions, decoder_mlps, tower_mlps
from grow.model.mlp import add_growth
from grow.model.projector import add_projector, find_projector
from grow.plan import GrowthPlan


def add_parts(model: nn.Module, plan: GrowthPlan) -> None:
    """Gives a model whatever a plan says, uninitialised, in place. Raises UserError where it does not fit."""
    add_growth(model, plan)
    add_heads(model, plan)
    if plan.projector:
        add_projector(model)


def kinds_of_parts(model: nn.Module) -> Iterator[list[Any]]:
    """Yields what can grow in a model, kind by kind, whether it has or not: MLPs, attentions, the MLPs of a tower, its
    projector."""
    for find in (decoder_mlps, decoder_attentions, tower_mlps):
        yield [module for _, module in sorted(find(model).items())]
    yield [module for module in [find_projector(model)] if module is not None]


def parts_with_alpha(model: nn.Module) -> Iterator[Any]:
    """Returns the parts that have an interpolation coefficient of their own: those that have grown, or were adapted."""
    return (part for kind in kinds_of_parts(model) for part in kind if hasattr(part, "own_alpha"))


def grown_beside_text(model: nn.Module) -> bool:
    """Says whether something of a model's tower for images, or its projector, has grown, which text does not show."""
    _, _, *beside = kinds_of_parts(model)
    return any(hasattr(part, "own_alpha") for kind in beside for part in kind)
