"""Gemma 3's projector from the tower's features to the language model."""

from collections.abc import Iterable
from typing import ClassVar

from grow.parts.part import Field, Part
from grow.plan import Where


class Projector(Part):
    """One matrix, which trains with the base's own kept."""

    name = "projector"
    made_of = "matrix"
    fields: ClassVar = {
        "train_projector": Field(False, "The projector from the tower trains as well, with its base kept."),
    }
    has_layers = False
    of_images = True

    def layer_of(self, module: str) -> int | None:
        """Returns 0 for the projector."""
        return 0 if module.rpartition(".")[2] == "multi_modal_projector" else None

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns its one matrix."""
        return (("mm_input_projection_weight",),)

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the projector from the tower for images"
