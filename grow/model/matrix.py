"""One linear map, trained with its base kept, such as the projector from a tower's features to the language model.

Its copy adds no capacity: W/2 + W' is one matrix again. It is kept apart so that the base's own stays as it is, and
goes between base and skill by the same α:

    y = (1 − α/2) · W x + α · W' x         W' begins as W/2
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.model.layouts import Instead, mix_in
from grow.model.mlp import with_growth


class _Copy(Instead):
    """Holds parameters of the shapes of a module's own, those of its layout, and computes as that does."""

    def __init__(self, module: Any):
        super().__init__(module)
        for name in self.layout:
            own = getattr(module, name)
            shape = getattr(own, "ds_shape", own.shape)  # whole, where ZeRO-3 partitions it
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=own.dtype)))


class GrownMatrix:
    """Is mixed into the class of a module that is already there, so that the base's tensors keep their names."""

    alpha: float
    own_alpha: float = 1.0
    grown: _Copy

    def forward(self, x: Tensor) -> Tensor:
        """Maps what the module maps."""
        base: Tensor = super().forward(x)  # type: ignore[misc]
        return base if self.alpha == 0 else with_growth(self.grown(x), base, 2, self.alpha)


def grow_matrix(module: Any, factor: int, trained_up: bool = False) -> None:
    """Gives a module a copy of the parameters of its layout, uninitialised, in place, whatever the factor."""
    mix_in(module, GrownMatrix, "Grown")
    module.alpha = 1.0
    module.grown = _Copy(module).train(module.training)
