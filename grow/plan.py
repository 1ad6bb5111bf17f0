"""GrowthPlan: which layers grow, and by which factor. It stands in a grown checkpoint's config.json under "growth"."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from grow.errors import UserError

FORMAT_VERSION = 1
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_MLP_KEY = re.compile(r"^((?:.*\.)?layers\.(\d+)\.mlp)\.(?:gate|up|down)_proj\.weight$")
_WRAPPERS = re.compile(r"^(?:(?:model|language_model)\.)+")


@dataclass(frozen=True)
class GrowthPlan:
    """Which MLPs of a model hold added copies.

    `factor` is k: the MLP's hidden width becomes k·intermediate_size, the base's own and k−1 added copies.
    `layers` are the indices of the grown decoder layers, ascending.
    """

    factor: int
    layers: tuple[int, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GrowthPlan | None":
        """Reads the "growth" object of a checkpoint's config; None if the checkpoint is not grown."""
        growth = config.get("growth")
        if growth is None:
            return None
        if growth.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"growth format version {growth.get('format_version')!r} is not known here "
                f"(this is version {FORMAT_VERSION}): use the release that wrote the checkpoint"
            )
        return cls(factor=growth["factor"], layers=tuple(growth["layers"]))


def parse_factor(factor: int | str) -> int:
    """Checks k. Raises UserError unless it is a whole number of at least 2."""
    try:
        k = int(factor)
    except ValueError:
        k = 0
    if k < 2 or str(k) != str(factor).strip():
        raise UserError(f"--factor {factor}: a whole number of at least 2 is needed")
    return k


def parse_layers(layers: str, num_layers: int) -> tuple[int, ...]:
    """Reads "all", or indices and ranges such as "0,3,7-9" (both ends included).

    Raises UserError for anything else, and for a layer that the model does not have.
    """
    text = str(layers).strip()
    if text == "all":
        return tuple(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise UserError(f"--layers {text}: {part!r} is neither a layer nor a range; write all, or 0,3,7-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--layers {text}: the range {part!r} runs backwards")
        if last >= num_layers:
            raise UserError(f"--layers {text}: layer {last} does not exist; the model has layers 0-{num_layers - 1}")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: multimodal configs keep it under "text_config"."""
    return config.get("text_config") or config


def mlp_prefixes(keys: Iterable[str]) -> dict[int, str]:
    """Maps each layer that has a gated MLP to the prefix of its keys, e.g. {3: "model.layers.3.mlp"}.

    Raises UserError, naming what was found instead, for models whose MLPs cannot be grown.
    """
    keys = list(keys)
    found: dict[str, set[str]] = {}
    layer_of: dict[str, int] = {}
    for key in keys:
        match = _MLP_KEY.match(key)
        if match:
            found.setdefault(match[1], set()).add(key)
            layer_of[match[1]] = int(match[2])
    for pattern, what in ((".experts.", "a mixture of experts"), (".gate_up_proj.", "a fused gate_up_proj")):
        if any(pattern in key for key in keys):
            raise UserError(f"the model has {what}, which cannot be grown; a plain gated MLP is needed")
    complete = {layer_of[prefix]: prefix for prefix, names in found.items() if len(names) == len(PROJECTIONS)}
    if not complete:
        raise UserError("no gated MLP in it (layers.<i>.mlp.gate_proj, up_proj, down_proj), so nothing can grow")
    if len(complete) != len(found):
        raise UserError("some MLPs lack one of gate_proj, up_proj, down_proj: the checkpoint is incomplete")
    for prefix in complete.values():
        if any(key.startswith(prefix) and key.endswith("_proj.bias") for key in keys):
            raise UserError(f"{prefix} has biases, which are not grown yet")
    return dict(sorted(complete.items()))


def canonical(key: str) -> str:
    """The part of a tensor's name that all layouts of a model share.

    On disk a Gemma 3 4B is `language_model.model.layers.…` (hub) or `model.language_model.layers.…` (newer saves), in
    memory `model.language_model.layers.…`; a 1B is `model.layers.…`. All become `layers.…`.
    """
    return _WRAPPERS.sub("", key)
