"""The projector from the tower's features to the language model, of Gemma 3 and Gemma 4."""

import re
from collections.abc import Iterable
from typing import ClassVar

from grow.errors import UserError
from grow.names import VISION, of_tower
from grow.parts.part import Base, Field, Part
from grow.plan import Where

_NAMES = re.compile(r"(?:^|\.)(?:multi_modal_projector|embed_vision\.embedding_projection)$")


class Projector(Part):
    """One matrix, which trains with the base's own kept."""

    name = "projector"
    made_of = "matrix"
    fields: ClassVar = {
        "train_projector": Field(False, "The projector from the tower trains as well, with its base kept."),
    }
    has_layers = False
    of_images = True

    def checked(self, base: Base, kind: str, layers: str, factor: int) -> tuple[int, ...]:
        """Returns (0,). Raises UserError where it cannot grow."""
        if not any(map(of_tower, base.tensors)):  # Gemma 4 Unified's class has other names
            raise UserError(f"--train-projector: {base.path} has no tower for images ({VISION}) that is known here")
        return super().checked(base, kind, layers, factor)

    def layer_of(self, module: str) -> int | None:
        """Returns 0 for the projector."""
        return 0 if _NAMES.search(module) else None

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns its one matrix: Gemma 3's, or Gemma 4's."""
        return (("mm_input_projection_weight",), ("weight",))

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the projector from the tower for images"
