"""G-Freeze: only the added copies train; everything that was there before stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from grow.errors import UserError
from grow.methods.method import Method

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass
class GFreeze(Method):
    """Trains `mlp.grown` of the grown layers ("Grow, Don't Overwrite", arXiv 2603.08647). Ends in a growth package.

    `kl_weight` times KL(base ‖ model) of the next token, on general text, can be added to the loss: `kl_text` is a
    folder whose split train has rows with a column text. It costs a forward pass of the base inside and a step's work
    on one sequence more (grow.training.near_base).
    """

    grows: ClassVar[bool] = True

    kl_weight: float = 0.0
    kl_text: str = ""

    def check(self, recipe: Any) -> None:
        """Raises UserError also for a weight without text."""
        super().check(recipe)
        if self.kl_weight < 0 or (self.kl_weight > 0) != bool(self.kl_text):
            raise UserError("kl_weight (above 0) and kl_text, a folder of general text, go together")
        if self.kl_text:
            self._text(recipe)

    def _text(self, recipe: Any) -> Any:
        from transformers import AutoTokenizer

        from grow.training.near_base import general_text

        tokenizer = AutoTokenizer.from_pretrained(recipe.start, local_files_only=True)
        return general_text(self.kl_text, recipe.max_length, tokenizer)

    def trains(self, name: str) -> bool:
        """The added copies."""
        return ".mlp.grown." in name

    def begin(self, trainer: Any) -> None:
        """Reads the general text, if the distance from the base counts."""
        if self.kl_weight:
            from grow.training.near_base import NearBase

            self.near_base = NearBase(trainer, self._text(trainer.recipe))

    def penalty(self) -> Tensor | float:
        """The distance from the base, times its weight."""
        return self.kl_weight * self.near_base.divergence() if self.kl_weight else 0.0

    def write_result(self, run: Path, out: Path) -> None:
        """The growth package, which `python -m grow attach` puts on the base again."""
        from grow.checkpoint.package import growth

        growth(str(run), str(out))
