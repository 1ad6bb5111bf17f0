"""FLOW: rows that the base finds hard count less, since it is they that pull it away from what it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grow.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Flow(Method):
    """Plain fine-tuning with the loss of row i weighted by exp(−ℓ_i / τ), where ℓ_i is the base's mean loss over the
    row's labels and τ the median of these ("Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting",
    arXiv 2502.02797). The weights are scaled to a mean of 1, so that a learning rate means what it does without."""

    def begin(self, trainer: Any) -> None:
        """Makes weights of the base's losses on the training rows."""
        import torch

        losses = trainer.start_losses()
        sequences = trainer.train_dataset.sequences
        packed = [row for rows in sequences.packed for row in rows]
        row_losses = torch.stack([losses[row].nanmean() for row in packed])
        weights = (-row_losses / row_losses.median()).exp()
        self.weights = weights.new_zeros(len(sequences.examples))
        self.weights[packed] = weights / weights.mean()

    def token_weights(self, rows: Tensor) -> Tensor | None:
        """The weight of each label's row."""
        return self.weights[rows]
