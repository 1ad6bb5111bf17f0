"""What of a transformer can grow: a file for each kind of part, and a line of PARTS."""

from collections.abc import Mapping
from typing import Any

from grow.errors import UserError, unknown
from grow.parts.attention import Attention
from grow.parts.embedding import Embedding
from grow.parts.mlps import Mlps
from grow.parts.part import Field, Part
from grow.parts.projector import Projector
from grow.parts.tower import Tower
from grow.plan import GrowthPlan, Where

MLPS = Mlps()
PARTS: dict[str, Part] = {part.name: part for part in (MLPS, Attention(), Tower(), Projector(), Embedding())}

FIELDS: dict[str, Field] = {name: field for part in PARTS.values() for name, field in part.fields.items()}
"""All fields that say what grows beside `layers` and `factor`."""


def grow_beside(fields: Mapping[str, Any]) -> list[Part]:
    """Returns what fields of a recipe, or flags, ask to grow beside MLPs of the decoder, or in their place."""
    return [part for part in PARTS.values() if part.asked(fields)]


def parts_of(plan: GrowthPlan) -> list[tuple[Part, Where]]:
    """Returns what grows by a plan, in the order of PARTS. Raises UserError for what is not known here."""
    for name, where in plan.beside.items():
        if name not in PARTS or name == MLPS.name:
            raise UserError(f"its growth, in its config.json, is of {name!r}, which is not known here")
        part = PARTS[name]
        if where.kind not in part.kinds:
            raise UserError(f"its growth, in its config.json, is of {name}: {unknown(where.kind, part.kinds, 'kind')}")
        if not where.layers or (part.made_of == "heads" and plan.factor != 2):
            raise UserError(f"its growth of {name}, in its config.json, makes no sense")
    there = plan.parts
    return [(part, there[name]) for name, part in PARTS.items() if name in there]


def growing(fields: Mapping[str, Any]) -> list[Part]:
    """Returns all that fields of a recipe ask to grow, `layers` among them."""
    return ([] if fields["layers"] == "none" else [MLPS]) + grow_beside(fields)


def grown_words(plan: GrowthPlan) -> str:
    """Returns what grows by a plan, in words."""
    return "; ".join(part.words(where, plan.factor) for part, where in parts_of(plan))
