"""What of a transformer can grow: a file for each kind of part, and a line of PARTS."""

from collections.abc import Iterator, Mapping
from typing import Any

from grow.errors import UserError, unknown
from grow.parts.attention import Attention
from grow.parts.mlps import Mlps
from grow.parts.part import Field, Part
from grow.parts.projector import Projector
from grow.parts.tower import Tower
from grow.plan import GrowthPlan, Where

MLPS = Mlps()
PARTS: dict[str, Part] = {part.name: part for part in (MLPS, Attention(), Tower(), Projector())}

FIELDS: dict[str, Field] = {name: field for part in PARTS.values() for name, field in part.fields.items()}
"""All fields that say what grows beside `layers` and `factor`."""


def grow_beside(fields: Mapping[str, Any]) -> list[Part]:
    """Returns what fields of a recipe, or flags, ask to grow beside MLPs of the decoder, or in their place."""
    return [part for part in PARTS.values() if part.asked(fields)]


def parts_of(plan: GrowthPlan) -> Iterator[tuple[Part, Where]]:
    """Yields what grows by a plan, in the order of PARTS. Raises UserError for what is not known here."""
    for name, where in plan.parts.items():
        if name not in PARTS or where.kind not in PARTS[name].kinds or not where.layers:
            said = f"{name} {where.kind}".strip()
            raise UserError(f"the growth in the checkpoint's config.json is of {unknown(said, PARTS, 'part')}")
    yield from ((part, plan.parts[name]) for name, part in PARTS.items() if name in plan.parts)


def grown_words(plan: GrowthPlan) -> list[str]:
    """Returns what grows by a plan, in words."""
    return [part.words(where) for part, where in parts_of(plan)]
