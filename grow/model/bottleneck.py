"""A bottleneck adapter after an MLP (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP").

    y = m + α · U · gelu(D · m),   m = mlp(x)        D [size, h], U [h, size], with biases

U and its bias are zero at first, so that the adapted model starts as the base exactly. α is the interpolation
coefficient: 0 is the base, 1 as trained. The trained parameters are in a folder of their own, without a copy of the
base:

    adapter.json           {"base": the base's folder, "adapter_size": size}
    adapter.safetensors    the adapters' parameters, by their names in the model
"""

from typing import Any

import torch
from torch import Tensor, nn

from grow.model.layouts import hidden_size, mix_in, up_layers

FILE, CONFIG = "adapter.safetensors", "adapter.json"


class Bottleneck(nn.Module):
    """Holds the layers D and U: from h to `size` and back."""

    def __init__(self, hidden_size: int, size: int, **kind: Any):
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, size, **kind)
        self.up_proj = nn.Linear(size, hidden_size, **kind)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        return self.up_proj(nn.functional.gelu(self.down_proj(x)))


class AdaptedMLP:
    """Is mixed into the class of an MLP that is already there, so that the base's tensors keep their names."""

    alpha: float
    own_alpha: float = 1.0
    adapter: Bottleneck

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, h] to […, h]."""
        output = super().forward(x)  # type: ignore[misc]
        return output if self.alpha == 0 else torch.add(output, self.adapter(output), alpha=self.alpha)


def adapt_mlp(mlp: Any, size: int) -> None:
    """Gives a gated MLP an adapter, in place."""
    mix_in(mlp, AdaptedMLP, "Adapted")
    own = up_layers(mlp)[0].weight
    mlp.alpha = 1.0
    mlp.adapter = Bottleneck(hidden_size(mlp), size, device=own.device, dtype=own.dtype)
