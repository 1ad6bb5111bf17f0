"""One linear map, trained with its base kept, such as the input embedding, or the projector from a tower
for images.

Its copy adds no capacity: W/2 + W' is one matrix again. It is kept apart so that the base's own stays as it is, and
goes between base and skill by the same α:

    y = (1 − α/2) · W x + α · W' x         W' begins as W/2
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.model.layouts import Instead, mix_in, mixed, stock_class
from grow.model.mlp import with_growth


class _Copy(Instead):
    """Holds parameters of the shapes of a module's own, those of its layout, and computes as that does."""

    def __init__(self, module: Any):
        super().__init__(module)
        for name in self.layout:
            own = getattr(module, name)
            shape = getattr(own, "ds_shape", own.shape)  # whole, where ZeRO-3 partitions it
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=own.dtype)))

    def extra_repr(self) -> str:
        """Returns what the module says of itself, which reads attributes that are its own."""
        said: str = self.__dict__["of"][0].extra_repr()
        return said


class GrownMatrix:
    """Is mixed into the class of a module that is already there, so that the base's tensors keep their names."""

    alpha: float
    own_alpha: float = 1.0
    training: bool
    switch: Any = None  # grow.model.switch.Switch, if the model has one
    grown: _Copy

    def forward(self, x: Tensor) -> Tensor:
        """Maps what the module maps."""
        base: Tensor = super().forward(x)  # type: ignore[misc]
        on = True if self.switch is None else self.switch.acts(self.training, x)
        # Under ZeRO-3 ranks gather parameters together, so each computes the same whether its own rows are on or off.
        every_rank = any(hasattr(parameter, "ds_id") for parameter in self.grown.parameters())
        if self.alpha == 0 or (on is False and not every_rank):
            return base
        y = with_growth(self.grown(x), base, 2, self.alpha)
        return y if on is True else torch.where(torch.as_tensor(on, device=y.device)[..., None], y, base)


def grow_matrix(module: Any, factor: int, trained_up: bool = False) -> None:
    """Gives a module a copy of the parameters of its layout, uninitialised, in place, whatever the factor."""
    mix_in(module, GrownMatrix, "Grown")
    module.alpha = 1.0
    # Of the module's class too, whose code may call super() (Gemma 3's embedding).
    module.grown = mixed(_Copy, stock_class(module), "Copied")(module).train(module.training)
