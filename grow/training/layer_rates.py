"""A learning rate of its own for each layer, as the recipe's `layer_rates` has it.

Adam moves a weight by about the learning rate whatever its gradient's size is, so a layer that shall move less takes a
smaller rate, and no smaller loss would do. Layers that gain much and forget little (grow.evaluation.layer_dial finds
them) may take a larger one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from grow.errors import UserError
from grow.plan import canonical

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def check_rates(factors: list[float], layers: int) -> None:
    """Raises UserError for factors that do not fit a model of so many layers."""
    if factors and len(factors) != layers:
        raise UserError(f"layer_rates: {len(factors)} factors; the model has {layers} layers, and each takes one")
    if factors and not (min(factors) >= 0 and 0 < max(factors) < float("inf")):
        raise UserError(
            "layer_rates: what the learning rate is multiplied by in each layer: 0 or more, one at least > 0"
        )


def rate_by_layer(optimizer: Optimizer, model: nn.Module, factors: list[float]) -> float:
    """Splits the groups of parameters so that what is in layer i has `factors[i]` times the rate, in place.

    What is in no layer keeps its rate. Before a scheduler or DeepSpeed sees the optimizer. Returns the first group's
    factor, since its rate is the one that Trainer logs. Raises UserError if all that trains would have a rate of 0.
    """
    by_parameter = {parameter: _factor(name, factors) for name, parameter in model.named_parameters()}
    parts = defaultdict(list)
    for place, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parts[by_parameter[parameter], place].append(parameter)
    largest, groups = max(parts)[0], list(optimizer.param_groups)
    if largest == 0:
        raise UserError("layer_rates: 0 for every layer that trains")
    optimizer.param_groups.clear()
    for (factor, place), parameters in sorted(parts.items(), key=lambda part: part[0], reverse=True):
        group = groups[place]
        optimizer.add_param_group(group | {"params": parameters, "lr": group["lr"] * factor})
    return largest


def _factor(name: str, factors: list[float]) -> float:
    layer = re.match(r"layers\.(\d+)\.", canonical(name))
    return factors[int(layer[1])] if layer else 1.0
