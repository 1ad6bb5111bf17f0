"""Gated MLPs as transformers' classes have them: gate, up and down, or gate and up as the halves of one matrix.

What growth adds has the layout of its base: products of other shapes would round in another way.

gate_proj, up_proj, down_proj, act_fn             Gemma, Llama, Qwen, Mistral …
gate_up_proj, down_proj, activation_fn            Phi 3 and 4, GLM 4: gate is the upper half
"""

import re
from typing import Any

from torch import Tensor, nn

_MLP_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


def gated_mlps(model: nn.Module) -> dict[int, nn.Module]:
    """Returns the gated MLPs of the decoder layers, by layer. A vision tower's MLPs are not gated, so not among
    them."""
    found = {}
    for name, module in model.named_modules():
        match = _MLP_MODULE.search(name)
        if match and hasattr(module, "down_proj") and (is_fused(module) or hasattr(module, "gate_proj")):
            found[int(match[1])] = module
    return found


def is_fused(mlp: Any) -> bool:
    """Says whether gate and up are one matrix."""
    return hasattr(mlp, "gate_up_proj")


def first_linear(mlp: Any) -> nn.Linear:
    """Returns a linear layer that reads the MLP's input, whose device and dtype are the MLP's."""
    layer: nn.Linear = mlp.gate_up_proj if is_fused(mlp) else mlp.gate_proj
    return layer


def width(mlp: Any) -> int:
    """Returns the number of hidden units, p."""
    return first_linear(mlp).out_features // (2 if is_fused(mlp) else 1)


def activation(mlp: Any) -> Any:
    """Returns the activation of the gate."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def gate_and_up(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns G x and U x, […, p] each, for x […, h]."""
    if is_fused(mlp):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up
    return mlp.gate_proj(x), mlp.up_proj(x)


def up_layers(mlp: Any) -> list[nn.Linear]:
    """Returns the linear layers of gate and up, one or two."""
    return [mlp.gate_up_proj] if is_fused(mlp) else [mlp.gate_proj, mlp.up_proj]
