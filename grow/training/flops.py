"""Model FLOPs utilisation (MFU) is the arithmetic of a step as a share of what the devices could do in its time.

It counts the arithmetic that the method needs, even if a run does more (activation checkpointing computes again). The
attention's products of queries and keys are left out: a few percent at the lengths of packed rows.
"""

import re
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from grow.model.grown import grown_units
from grow.model.layouts import sizes, up_layers
from grow.names import canonical, of_language_model

# Dense bf16 FLOP/s of the makers' data sheets, by what torch calls the device.
_PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "A40": 150e12, "A10": 125e12, "L4": 121e12, "RTX 4090": 165e12, "MI300X": 1307e12,
}  # fmt: skip


def peak() -> float | None:
    """Returns the peak bf16 FLOP/s of this process's GPU; None for a device that is not in the table, such as a CPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    return next((rate for name, rate in _PEAK.items() if re.search(rf"\b{re.escape(name)}\b", device)), None)


class StepFlops:
    """Counts the FLOPs of a training step, from the shapes of the model's linear layers, before ZeRO partitions them or
    after.

    A product of [N, in] and [in, out] is 2·N·in·out. A layer's forward pass is one; its weight's gradient, if that
    trains, another; and the gradient of its input one more, if anything below it trains (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1, for the case that all trains). The head works at labels, all else at tokens. The count is
    exact, except for a few products of the lowest layer that trains, whose modules share an input.
    """

    def __init__(self, model: nn.Module):
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.per_token = self.per_label = 0
        # A trained up-projection takes the place of the base's own, which is not computed then (grow.model.mlp).
        idle = {own for mlp in grown_units(model) if mlp.trained is not None for own in up_layers(mlp)}
        reached = any(p.requires_grad for name, p in model.named_parameters() if "embed_tokens" in canonical(name))
        for name, module in model.named_modules():
            weight: Any = getattr(module, "weight", None)
            trains = weight is not None and weight.requires_grad
            if isinstance(module, nn.Linear | Conv1D) and of_language_model(name) and module not in idle:
                flops = 2 * prod(sizes(module)) * (1 + trains + reached)
                if module is head:
                    self.per_label += flops
                else:
                    self.per_token += flops
            reached = reached or trains

    def of(self, tokens: float, labels: float) -> float:
        """Returns the FLOPs for a number of tokens of text and of labels among them."""
        return tokens * self.per_token + labels * self.per_label
