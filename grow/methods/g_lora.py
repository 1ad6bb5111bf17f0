"""G-LoRA: the added copies move in few directions; everything that was there before stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from grow.methods.g_freeze import GFreeze
from grow.methods.lora import Lora


@dataclass
class GLora(Lora, GFreeze):
    """G-Freeze with a low-rank update of the copies in place of a free one: a LoRA in each of their three projections,
    merged into them when training has ended. Ends in the same growth package, with the optimizer of a LoRA."""

    def targets(self, name: str) -> bool:
        """The copies' projections."""
        return ".mlp.grown." in name

    def trains(self, name: str) -> bool:
        """Their LoRA alone."""
        return self.part in name
