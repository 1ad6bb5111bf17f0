"""The method itself: a gated MLP that has grown.

The base's MLP computes y = D · (act(G x) ⊙ (U x)). Growing it by a factor k adds k−1 copies of the hidden units and
divides every down-projection by k ("Grow, Don't Overwrite", arXiv 2603.08647, section on growing the MLP). Here the
base's own weights stay as they are, unscaled, and the added copies are a second branch:

    y = base(x) / k + grown(x)                                     at α = 1
    y = (1 − α(k−1)/k) · base(x) + α · grown(x)                    α from 0, the base, to 1, the trained model

At step 0 grown(x) is (k−1)/k · base(x). For k = 2 the halving is exact in binary floating point and so is the sum of
two halves: the grown model's output is the base's bit for bit. One concatenated MLP would sum in another order.
"""

from typing import Any

import torch
from torch import Tensor, nn


class GrownBranch(nn.Module):
    """The added copies: gate and up of shape [(k−1)·p, h], down of shape [h, (k−1)·p] (already divided by k).

    With biases where the base has them; the down-projection's is one, [h], times (k−1)/k.
    """

    def __init__(self, mlp: Any, width: int):
        super().__init__()
        hidden_size = mlp.gate_proj.in_features
        self.gate_proj = nn.Linear(hidden_size, width, bias=mlp.gate_proj.bias is not None)
        self.up_proj = nn.Linear(hidden_size, width, bias=mlp.up_proj.bias is not None)
        self.down_proj = nn.Linear(width, hidden_size, bias=mlp.down_proj.bias is not None)
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[…, h] → […, h]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GrownMLP:
    """Mixed into the class of an MLP that is already there, so that the base's tensors keep their names."""

    factor: int
    alpha: float
    grown: GrownBranch

    def forward(self, x: Tensor) -> Tensor:
        """[…, h] → […, h]."""
        base = super().forward(x)  # type: ignore[misc]
        if self.alpha == 0:
            return base
        k = self.factor
        grown = self.grown(x)
        if self.alpha != 1:
            grown = self.alpha * grown
        return torch.add(grown, base, alpha=1 - self.alpha * (k - 1) / k)


def grow_mlp(mlp: Any, factor: int) -> None:
    """Gives a gated MLP (modules gate_proj, up_proj, down_proj, act_fn) its added copies, in place.

    The copies are not initialised: a checkpoint's loader fills them.
    """
    cls = type(mlp)
    mlp.__class__ = type(f"Grown{cls.__name__}", (GrownMLP, cls), {})
    mlp.factor, mlp.alpha = factor, 1.0
    mlp.grown = GrownBranch(mlp, (factor - 1) * mlp.gate_proj.out_features)
