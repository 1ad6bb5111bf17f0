"""What methods share that can be held near the base while they train."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from grow.errors import UserError
from grow.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Held(Method):
    """`kl_weight` times KL(base ‖ model) of the next token, on general text, can be added to the loss: `kl_text` are
    folders whose split train has rows with a column text; they take turns. It costs a forward pass of the base and a
    step's work on one sequence more (grow.training.near_base).

    A method that keeps its base has it inside. Others then hold a second model on every rank, whole, and so do not
    work with ZeRO-3.
    """

    kl_weight: float = 0.0
    kl_text: list[str] = field(default_factory=list)

    def check(self, recipe: Any) -> None:
        """Raises UserError also for a weight without text, and where the base cannot be held."""
        super().check(recipe)
        if self.kl_weight < 0 or (self.kl_weight > 0) != bool(self.kl_text):
            raise UserError("kl_weight (above 0) and kl_text, folders of general text, go together")
        if self.kl_weight and not self.keeps_base and recipe.zero.get("stage") == 3:
            raise UserError(
                f"{recipe.deepspeed}: {recipe.method} with kl_weight holds a second model and does not work with "
                "ZeRO-3; give --deepspeed a config of stage 1 or 2"
            )
        if self.kl_text:
            self._text(recipe)

    def reads(self, recipe: Any) -> list[str]:
        """The general text."""
        return self.kl_text if self.kl_weight else []

    def holds(self, shapes: dict[str, tuple[int, ...]], width: int) -> int:
        """The second model."""
        return width * sum(map(prod, shapes.values())) if self.kl_weight and not self.keeps_base else 0

    def begin(self, trainer: Any) -> None:
        """Reads the general text, and the base where it is not inside."""
        if not self.kl_weight:
            return
        from grow.model import load
        from grow.training.near_base import NearBase

        base = None
        if not self.keeps_base:
            base = load(trainer.recipe.base_name, trainer.model.dtype).to(trainer.args.device)
        self.near_base = NearBase(trainer, self._text(trainer.recipe), base)

    def _text(self, recipe: Any) -> Any:
        from grow.training.near_base import general_text

        return general_text(self.kl_text, recipe.max_length, recipe.tokenizer(), recipe.seed)

    def penalty(self) -> Tensor | float:
        """The distance from the base, times its weight."""
        return self.kl_weight * self.near_base.divergence() if self.kl_weight else 0.0
