"""The projector from a tower's features to the language model, trained with its base kept.

It is one matrix, so its copy adds no capacity: W/2 + W' is one matrix again. It is kept apart so that the base's own
stays as it is, and goes between base and skill by the same α:

    y = (1 − α/2) · W norm(x) + α · W' norm(x)         W' begins as W/2
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.errors import UserError
from grow.model.layouts import Instead, mix_in
from grow.model.mlp import with_growth
from grow.names import PROJECTION, PROJECTOR


class _Copy(Instead):
    """Holds a matrix of the shape of a projector's own, and computes as that does."""

    def __init__(self, projector: Any):
        super().__init__(projector)
        self.__dict__["layout"] = (PROJECTION,)
        own = getattr(projector, PROJECTION)
        shape = getattr(own, "ds_shape", own.shape)  # whole, where ZeRO-3 partitions it
        self.register_parameter(PROJECTION, nn.Parameter(torch.empty(shape, dtype=own.dtype)))


class GrownProjector:
    """Is mixed into the class of a projector that is already there, so that the base's tensors keep their names."""

    alpha: float
    own_alpha: float = 1.0
    grown: _Copy

    def forward(self, features: Tensor) -> Tensor:
        """Maps a tower's features to the language model's."""
        base: Tensor = super().forward(features)  # type: ignore[misc]
        return base if self.alpha == 0 else with_growth(self.grown(features), base, 2, self.alpha)


def add_projector(model: nn.Module) -> None:
    """Gives a model's projector its copy, uninitialised, in place. Raises UserError for a model without such a one."""
    projector = find_projector(model)
    if projector is None:
        raise UserError(f"the growth of a projector does not fit the model, which has no {PROJECTOR}.{PROJECTION}")
    mix_in(projector, GrownProjector, "Grown")
    projector.alpha = 1.0
    projector.grown = _Copy(projector).train(projector.training)


def find_projector(model: nn.Module) -> Any:
    """Returns a model's projector, if it is one that is known; else None."""
    named = (module for name, module in model.named_modules() if name.rpartition(".")[2] == PROJECTOR)
    return next((module for module in named if hasattr(module, PROJECTION)), None)


def grown_projector(model: nn.Module) -> Any:
    """Returns a model's projector if it has a copy; else None."""
    projector = find_projector(model)
    return projector if isinstance(projector, GrownProjector) else None
