"""Gemma 3's projector from the tower's features to the language model."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from grow.errors import UserError
from grow.parts.part import Base, Field, Part
from grow.plan import Where

_MODULE, _MATRIX = "multi_modal_projector", "mm_input_projection_weight"


class Projector(Part):
    """One matrix, which trains with the base's own kept."""

    name = "projector"
    made_of = "matrix"
    fields: ClassVar = {
        "train_projector": Field(False, "The projector from the tower trains as well, with its base kept."),
    }
    text_reaches_it = False

    def planned(self, base: Base, fields: Mapping[str, Any], factor: int) -> Where | None:
        """Returns that it grows; None if that is not asked. Raises UserError for a base without such a projector."""
        if not self.asked(fields):
            return None
        name = f"{self.prefixes(base.tensors).get(0)}.{_MATRIX}"
        if name not in base.tensors or len(base.tensors[name].shape) != 2 or not base.tensors[name].is_float:
            raise UserError(f"train_projector: {base.path} has no projector that is known here ({_MODULE}.{_MATRIX})")
        return Where((0,))

    def layer_of(self, module: str) -> int | None:
        """Returns 0 for the projector."""
        return 0 if module.rpartition(".")[2] == _MODULE else None

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns its one matrix."""
        return ((_MATRIX,),)

    def words(self, where: Where) -> str:
        """Returns what has grown, in words."""
        return "the projector from the tower for images"
