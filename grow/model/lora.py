"""LoRAs that are not merged: PEFT's layers in a model, which a switch can leave out (grow.model.switch)."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grow.errors import UserError
from grow.model.layouts import change_class
from grow.model.where_on import where_on
from grow.names import LAYERS, is_copy

# PEFT takes the LoRA's start out of the base's own weights.
_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LAYER = re.compile(rf"(?:^|\.){LAYERS}\.(\d+)\.(\w+)")


class SwitchedLora:
    """Is mixed into the class of PEFT's linear layer, so that its parameters keep their names."""

    switch: Any
    training: bool
    base_layer: nn.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps […, in] to […, out]."""
        on, every_rank = self.switch.acts(self.training, x), hasattr(self.base_layer.weight, "ds_id")
        if on is True and not every_rank:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]

        def full(chosen: Tensor, _: Tensor) -> Tensor:
            return super(SwitchedLora, self).forward(chosen, *args, **kwargs)  # type: ignore[misc]

        return where_on(on, x, self.base_layer(x), full, every_rank)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Returns PEFT's linear layers outside of grown MLPs, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and not is_copy(name)}


def not_scaled(config: dict[str, Any]) -> str:
    """Says what of an adapter of PEFT's, by its config, `scale_loras` leaves as it is: training moved it too, or put
    it in the base's place. "" if there is no such thing."""
    if config.get("peft_type") != "LORA":
        return f"an adapter of the kind {config.get('peft_type')}"
    for field in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if config.get(field):
            return f"a LoRA with {field}"
    if config.get("bias", "none") != "none":
        return f"a LoRA with bias: {config['bias']}"
    start = str(config.get("init_lora_weights"))
    return f"a LoRA with init_lora_weights: {start}" if start.startswith(_OF_THE_BASE) else ""


def _not_scaled(model: nn.Module) -> str:
    configs = (config.to_dict() for config in (getattr(model, "peft_config", None) or {}).values())
    return next(filter(None, map(not_scaled, configs)), "")


def has_scaled_loras(model: nn.Module) -> bool:
    """Says whether a model has LoRAs, all of which `scale_loras` takes back to the base."""
    return bool(lora_layers(model)) and not _not_scaled(model)


def check_scales(kind: str, alpha: float) -> None:
    """Raises UserError for an interpolation coefficient where `not_scaled` says that there is none."""
    if kind and alpha != 1:
        raise UserError(
            f"alpha {alpha:g}: {kind} has no coefficient before it is merged; merge it (grow consolidate RUN OUT, or "
            f"PEFT's merge_and_unload), and name its base beside it: --start BASE"
        )


def scale_loras(model: nn.Module, alpha: float) -> None:
    """Sets the interpolation coefficient of LoRAs that are not merged: 0 is the base, exactly, 1 as trained. The
    weights W + α·s·B A, s LoRA's own scaling, are those that merging at α has. Raises UserError for adapters that have
    none, unless α is 1."""
    check_scales(_not_scaled(model), alpha)
    for layer in lora_layers(model).values():
        if alpha != 1 and getattr(layer, "merged", False):
            raise UserError(f"alpha {alpha:g}: LoRAs are merged into the weights; take them out with unmerge_adapter()")
        known = layer.__dict__.setdefault("scaled", {})
        for name, scaling in layer.scaling.items():
            own, now = known.get(name, (scaling, scaling))
            if scaling != now:  # an adapter that was put in, or scaled by PEFT, since
                own = scaling
            layer.scaling[name] = alpha * own
            known[name] = own, alpha * own


@contextlib.contextmanager
def scalings_kept(model: nn.Module) -> Iterator[None]:
    """Puts the coefficients of LoRAs back when the context ends."""
    before = [
        (layer, dict(layer.scaling), dict(layer.__dict__.get("scaled", {}))) for layer in lora_layers(model).values()
    ]
    try:
        yield
    finally:
        for layer, scaling, known in before:
            layer.scaling.update(scaling)
            layer.scaled = known


def highest_unchanged(names: list[str]) -> int:
    """Returns the highest layer whose MLP's input LoRAs in these modules leave as it is; −1 if there is none. One in a
    layer's MLP leaves it, one in its attention does not."""
    found = [(int(match[1]), match[2]) for name in names for match in [_LAYER.search(name)] if match]
    return min(layer - (part != "mlp") for layer, part in found)


def switch_lora(layer: Any, switch: Any) -> None:
    """Lets a switch leave out one of PEFT's layers, in place."""
    cls = type(layer)
    change_class(layer, type(f"Switched{cls.__name__}", (SwitchedLora, cls), {}))
    layer.switch = switch


class RankGate(nn.Linear):
    """A gate for each rank of a LoRA, σ(W x + b), in (0, 1); b is −3 at first (arXiv 2605.19028).

    There the gates' rate is 5 times the LoRA's. Adam's steps do not depend on a gradient's scale, so parameters that
    count 5 times come to the same: W and b are held divided by that.
    """

    RATE, BIAS = 5.0, -3.0

    def reset_parameters(self) -> None:
        """Sets W as torch does for a linear layer, and b."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight /= self.RATE
            self.bias.fill_(self.BIAS / self.RATE)

    def forward(self, x: Tensor) -> Tensor:
        """Maps […, in] to […, rank]."""
        return torch.sigmoid(self.RATE * super().forward(x))


def add_gates(model: nn.Module) -> None:
    """Gives each of PEFT's linear layers gates between its A and its B, in place."""
    for layer in lora_layers(model).values():
        down = layer.lora_A["default"]
        kind = {"device": down.weight.device, "dtype": down.weight.dtype}
        layer.lora_gate = RankGate(down.in_features, down.out_features, **kind)
        down.register_forward_hook(lambda _, inputs, output, gate=layer.lora_gate: output * gate(inputs[0]))
