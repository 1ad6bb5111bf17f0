"""FLOW: rows that the base finds hard get less weight, since they pull it away from what it knows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grow.methods.method import Method


@dataclass
class Flow(Method):
    """Fine-tunes with the loss of row i weighted by exp(−ℓ_i / τ), where ℓ_i is the base's mean loss over the row's
    labels and τ the median of these ("Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting", arXiv 2502.02797).
    The weights are scaled to a mean of 1, so that a learning rate means what it does without."""

    def begin(self, trainer: Any) -> None:
        """Computes the weights from the base's losses on the training rows that the run comes to."""
        losses = torch.stack([row.nanmean() for row in trainer.start_losses()])
        seen = ~losses.isnan()
        weights = (-losses / losses[seen].median()).exp()
        self.weights = weights.div(weights[seen].mean()).where(seen, 0)

    def token_weights(self, rows: Tensor) -> Tensor | None:
        """Returns the weight of each label's row."""
        return self.weights[rows]
