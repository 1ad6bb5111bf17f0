"""Selective token masking: tokens that the base finds improbable are not trained on."""

from dataclasses import dataclass
from math import log
from typing import Any

import torch

from grow.errors import UserError
from grow.methods.method import Method


@dataclass
class Stm(Method):
    """Fine-tunes on the labels whose perplexity under the base, 1/p, is at most `stm_threshold` (selective token
    masking, arXiv 2501.14315, which uses 2.5)."""

    stm_threshold: float = 2.5

    def check(self, recipe: Any) -> None:
        """Raises UserError also for a threshold that excludes every token."""
        super().check(recipe)
        if recipe.mix:
            raise UserError("mix: stm masks tokens of one data set; take mix out, or another method")
        if self.stm_threshold <= 1:
            raise UserError(f"stm_threshold {self.stm_threshold:g}: a perplexity above 1 is needed, such as 2.5")

    def begin(self, trainer: Any) -> None:
        """Removes the labels whose loss in the base is too high. Raises UserError if none is left."""
        dropped = ~(torch.cat(trainer.start_losses()) <= log(self.stm_threshold))
        trainer.train_dataset.sequences.examples.drop_labels(dropped.cpu().numpy())
        if dropped.all():
            raise UserError(f"stm_threshold {self.stm_threshold:g}: every label's perplexity is above it; raise it")
