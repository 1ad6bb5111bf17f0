"""MLPs as transformers' classes have them, whatever their layers are called (grow.names.LAYOUTS).

    y = D · (act(G x) ⊙ (U x))      gate and up apart, or the halves of one matrix; D the down-projection
    y = D · act(U x)                without a gate

What growth adds has the layout of its base: products of other shapes would round in another way.
"""

import re
from typing import Any

from torch import Tensor, nn

from grow.names import FUSED, LAYOUTS

_MLP_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")
_TOWERS = re.compile(r"(?:^|\.)(?:vision|visual|audio)\w*\.")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


def decoder_mlps(model: nn.Module) -> dict[int, nn.Module]:
    """Returns the MLPs of the decoder layers, by layer; not those of towers for images and sound."""
    found = {}
    for name, module in model.named_modules():
        match = _MLP_MODULE.search(name)
        if match and not _TOWERS.search(name) and layout_of(module):
            found[int(match[1])] = module
    return found


def layout_of(mlp: Any) -> tuple[str, ...]:
    """Returns the names of an MLP's matrices, the down-projection's last; () for a module of another kind. A module
    that has `layout` has been asked before."""
    known: tuple[str, ...] | None = mlp.__dict__.get("layout")
    if known is not None:
        return known
    return next((names for names in LAYOUTS if all(hasattr(mlp, name) for name in names)), ())


def up_names(mlp: Any) -> tuple[str, ...]:
    """Returns the names of the linear layers that read the MLP's input: gate and up, or one of both, or up alone."""
    return layout_of(mlp)[:-1]


def up_layers(mlp: Any) -> list[nn.Linear]:
    """Returns the linear layers that read the MLP's input, whose device and dtype are the MLP's."""
    return [getattr(mlp, name) for name in up_names(mlp)]


def down_name(mlp: Any) -> str:
    """Returns the name of the down-projection."""
    return layout_of(mlp)[-1]


def down_layer(mlp: Any) -> nn.Linear:
    """Returns the down-projection."""
    layer: nn.Linear = getattr(mlp, down_name(mlp))
    return layer


def halves(mlp: Any) -> int:
    """Returns of how many matrices each of up_layers consists, one above the other."""
    return 2 if up_names(mlp)[0] == FUSED else 1


def hidden_size(mlp: Any) -> int:
    """Returns h."""
    return up_layers(mlp)[0].in_features


def width(mlp: Any) -> int:
    """Returns the number of hidden units, p."""
    return up_layers(mlp)[0].out_features // halves(mlp)


def activation(mlp: Any) -> Any:
    """Returns the activation."""
    return next(getattr(mlp, name) for name in _ACTIVATIONS if hasattr(mlp, name))


def pre_activations(mlp: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Returns G x and U x, or U x alone, […, p] each, for x […, h]."""
    found = tuple(layer(x) for layer in up_layers(mlp))
    return found[0].chunk(2, dim=-1) if halves(mlp) == 2 else found


def from_hidden_units(mlp: Any, act: Any, pre: tuple[Tensor, ...]) -> Tensor:
    """Returns what the down-projection makes of the hidden units, […, h]."""
    units = act(pre[0])
    return down_layer(mlp)(units * pre[1] if len(pre) == 2 else units)
