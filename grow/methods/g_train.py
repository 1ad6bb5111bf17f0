"""G-Train: the added copies train, and so do the original gate and up projections of the grown layers."""

from dataclasses import dataclass
from typing import Any

import torch

from grow.methods.g_freeze import GFreeze
from grow.model.gather import gathered
from grow.model.grown import grown_units
from grow.model.layouts import up_layers
from grow.names import is_copy, is_down, own_name


@dataclass
class GTrain(GFreeze):
    """Trains `mlp.grown` and `mlp.trained`, a copy of the original up-projection that replaces it in the forward pass
    ("Grow, Don't Overwrite", arXiv 2603.08647), so that the base's own weights stay as they are."""

    def add_parameters(self, model: Any) -> None:
        """Gives each grown layer a copy of its gate and up, unless the checkpoint has brought trained ones."""
        for part in grown_units(model):
            if part.trained is None:
                _copy_up(part)

    def added_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a gate and an up for each grown layer."""
        copies = [name for name in shapes if is_copy(name) and not is_down(name)]
        return {name.replace(".grown.", ".trained."): shapes[own_name(name)] for name in copies}

    def trains(self, name: str) -> bool:
        """Says whether a parameter was added by growth, and is of a chosen matrix."""
        return self.chosen(name)


def _copy_up(mlp: Any) -> None:
    own = [parameter for layer in up_layers(mlp) for parameter in layer.parameters()]
    with gathered(*own), torch.no_grad():
        mlp.add_trained(device=own[0].device, dtype=own[0].dtype)
        for copy, original in zip(mlp.trained.parameters(), own, strict=True):
            copy.copy_(original)
