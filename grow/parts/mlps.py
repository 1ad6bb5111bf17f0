"""The MLPs of the decoder layers."""

from collections.abc import Iterable, Mapping
from typing import Any

from grow.errors import UserError, one_line
from grow.names import BOUNDS, FUSED, INNER, LAYOUTS, OTHER_TOWERS, VIT, is_growth, mlp_prefixes
from grow.parts.part import TENSORS, Base, Part, check_floats, is_transposed, layer_in
from grow.plan import Where, growing_layers, mlp_widths, setting, text_config, width_key, with_text_config

_WITHOUT_GATE, _ACTIVATIONS = ("arcee", "nemotron", "apertus", "jais2"), ("act_fn", "activation_fn", "act")
_NOT_ALONE = {
    "bloom": "its MLP adds what goes past it",
    "gpt_neox_japanese": "its config has no width of its own for the MLPs",
    "openai-gpt": "its class fixes the width of the MLPs",
}
"""Kinds of model (model_type) whose MLPs look plain by their tensors, and why they cannot grow."""


class Mlps(Part):
    """Gate, up and down, in any of grow.names.LAYOUTS. They grow unless only something else is asked to; `layers` says
    which."""

    name = "mlps"
    narrower = "layers {} are not grown as wide as others, and stock models have one width"

    def planned(self, base: Base, fields: Mapping[str, Any], factor: int) -> Where | None:
        """Returns the layers that grow, None for "none".

        Raises UserError where they cannot; and for a base without plain MLPs even if none grow, since other parts are
        known only beside these.
        """
        layers = str(fields["layers"])
        count = len(self.checked_prefixes(base))
        return None if layers == "none" else Where(growing_layers(layers, count, base.config))

    def checked_prefixes(self, base: Base) -> dict[int, str]:
        """Returns what `prefixes` does. Raises UserError if an MLP is missing or its shapes do not fit."""
        try:
            prefixes = self.prefixes(base.tensors)
        except UserError as error:
            raise UserError(f"{base.path}: {error}") from None
        text = text_config(base.config)
        if text.get("model_type") in _NOT_ALONE:
            raise UserError(f"{base.path}: {text['model_type']}: {_NOT_ALONE[text['model_type']]}, so it cannot grow")
        count = setting(text, "num_hidden_layers") or len(prefixes)
        if list(prefixes) != list(range(len(prefixes))) or len(prefixes) != count:
            raise UserError(f"{base.path}: has MLPs in layers {list(prefixes)}, its config speaks of {count} layers")
        try:
            widths = mlp_widths(base.config, count)
        except UserError as error:
            raise UserError(f"{base.path}: {error}") from None
        for layer, prefix in prefixes.items():
            width = widths[layer] if widths else None
            layout = self.on_disk(base, prefix)
            check_mlp(base, prefix, layout, setting(text, "hidden_size"), width, text.get("model_type"))
        return prefixes

    def prefixes(self, names: Iterable[str]) -> dict[int, str]:
        """Maps each layer to the prefix of its MLP's tensors. Raises UserError for models whose MLPs cannot grow."""
        return mlp_prefixes(names)

    def layer_of(self, module: str) -> int | None:
        """Returns the layer of an MLP; None for other modules, and those of towers for images and sound."""
        return None if OTHER_TOWERS.search(module) else layer_in(module, "mlp")

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns all that are known."""
        return LAYOUTS

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the MLPs"

    def must_be_alone(self, where: Where) -> str:
        """Returns "": MLPs can be one of several skills."""
        return ""

    def stock_widths(self, base: Base, units: dict[int, int]) -> dict[int, int]:
        """Returns the width of each layer's stock MLP: its own where the config has a list of them, else one for all;
        or, in Gemma 4, one for layers with keys of their own and twice as much for others."""
        own, size = mlp_widths(base.config, len(units)), setting(text_config(base.config), "intermediate_size")
        if isinstance(size, list):
            return units
        times = {layer: own[layer] // size if own and size else 1 for layer in units}
        one = max((-(-count // times[layer]) for layer, count in units.items()), default=0)
        return {layer: one * times[layer] for layer in units}

    def stock_config(self, config: dict[str, Any], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Writes the width, or the widths, of the MLPs."""
        text, prefixes = text_config(config), self.prefixes(base.tensors).values()
        axis = 0 if is_transposed(config) else 1
        widths = [shapes[f"{prefix}.{self.on_disk(base, prefix)[-1]}.weight"][axis] for prefix in prefixes]
        before, size = mlp_widths(base.config, len(widths)), setting(text, "intermediate_size")
        one_for_all = widths[0] if before is None else widths[0] * (size if isinstance(size, int) else 1) // before[0]
        return with_text_config(config, {width_key(text): widths if isinstance(size, list) else one_for_all})


def check_mlp(
    base: Base, prefix: str, layout: tuple[str, ...], hidden_size: int | None, width: int | None,
    model_type: str | None,
) -> None:  # fmt: skip
    """Raises UserError unless the tensors with a prefix are those of a plain MLP with these matrices and of these
    sizes, in one float type."""
    if layout == ("up_proj", "down_proj") and model_type not in _WITHOUT_GATE:
        raise UserError(
            f"{base.path}: {prefix} lacks one of gate_proj, up_proj, down_proj: the checkpoint is incomplete"
        )
    inside = tuple(f"{prefix}.{name.partition('.')[0]}." for name in layout) if layout == VIT else f"{prefix}."
    for name in base.tensors:
        if name.startswith(inside) and not is_growth(name) and not _known(name.removeprefix(f"{prefix}."), layout):
            raise UserError(
                f"{base.path}: {one_line(name)}: what it does to copies is not known here; a plain MLP is needed"
            )
    infos = [base.tensors[f"{prefix}.{name}.weight"] for name in layout]
    order = -1 if is_transposed(base.config) else 1
    h, p = infos[-1].shape[::order] if len(infos[-1].shape) == 2 else (0, 0)
    rows = 2 * p if layout[0] == FUSED else p
    expected = (width or p, hidden_size or h)
    if any(info.shape[::order] != (rows, h) for info in infos[:-1]) or (p, h) != expected or 0 in (p, h):
        shapes = ", ".join(f"{name} {list(info.shape)}" for name, info in zip(layout, infos, strict=True))
        raise UserError(
            f"{base.path}: {prefix} has {shapes}, which do not fit together and with the config's "
            f"intermediate_size {expected[0]} and hidden_size {expected[1]}"
        )
    biases = [base.tensors.get(f"{prefix}.{name}.bias") for name in layout]
    for name, bias, length in zip(layout, biases, (*[rows] * (len(layout) - 1), h), strict=True):
        if bias is not None and bias.shape != (length,):
            raise UserError(f"{base.path}: {prefix}.{name}.bias is {list(bias.shape)}, the weight asks for [{length}]")
    check_floats(base, prefix, [f"{prefix}.{name}.{tensor}" for name in layout for tensor in TENSORS])


def _known(end: str, layout: tuple[str, ...]) -> bool:
    """Says whether it is known what a tensor of an MLP, by the end of its name, does to copies."""
    module, _, name = end.rpartition(".")
    inside = (matrix.removesuffix(f".{INNER}") for matrix in layout)
    return module in layout or module.split(".")[-1] in _ACTIVATIONS or (module in inside and name in BOUNDS)
