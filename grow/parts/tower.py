"""The MLPs of a tower for images: SigLIP's in Gemma 3, Gemma 4's own; CLIP's, ViT's, DINOv2's, InternVL's and Pixtral's
below other language models."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from grow.errors import UserError
from grow.names import INNER, LAYOUTS, TOWER_MLP, VISION, of_tower, tower_prefixes
from grow.parts.mlps import check_mlp
from grow.parts.part import Base, Field, Part, in_layers, layer_in
from grow.plan import Where, parse_layers, ranges

_CONFIG = "vision_config"
_RATIO = "mlp_ratio"
"""What DINOv2's config has in place of intermediate_size: that over hidden_size."""
_OF_MLP = re.compile(rf"\.{TOWER_MLP}\.")


class Tower(Part):
    """They grow as the MLPs of the decoder do."""

    name = "tower"
    kinds = ("vision",)
    fields: ClassVar = {
        "tower": Field(
            "", '"vision": the MLPs of the tower for images grow as well, or alone where --layers is not given.'
        ),
        "tower_layers": Field("", "The layers of the tower that grow, written as in --layers; all if not given."),
    }
    of_images = True
    narrower = "layers {} of the tower are not grown as wide as others, and it has one width"

    def checked(self, base: Base, kind: str, layers: str, factor: int) -> tuple[int, ...]:
        """Returns the layers whose MLPs grow, of those that the model uses. Raises UserError where they cannot."""
        prefixes, config = self.prefixes(base.tensors), base.config.get(_CONFIG)
        if not isinstance(config, dict) or not any(map(of_tower, base.tensors)):
            raise UserError(f"--tower {kind}: {base.path} has no tower for images ({VISION}) that is known here")
        count = config.get("num_hidden_layers", len(prefixes))  # hub configs may leave their class's default out
        if list(prefixes) != list(range(len(prefixes))) or not prefixes or len(prefixes) != count:
            raise UserError(
                f"--tower {kind}: {base.path}: a plain MLP in each of its {count} layers is needed, and there are "
                f"{len(prefixes)} that can grow"
            )
        hidden, ratio = config.get("hidden_size"), config.get(_RATIO)
        sizes = hidden, int(hidden * ratio) if hidden and ratio else config.get("intermediate_size")
        for prefix in prefixes.values():
            check_mlp(base, prefix, self.on_disk(base, prefix), *sizes, None)
        layers_own = tuple(f"{prefix}." for prefix in prefixes.values())
        of_mlps = (name for name in filter(of_tower, base.tensors) if _OF_MLP.search(name))
        other = next((name for name in of_mlps if not name.startswith(layers_own)), "")
        if other:  # such as SigLIP's attention pooling head, which Gemma 3 and LLaVA go without (vision_use_head)
            raise UserError(f"--tower {kind}: {base.path}: {other} is as wide as the layers' MLPs, but of none of them")
        used = _used_layers(base.config, len(prefixes))
        chosen = parse_layers(layers, len(prefixes), "--tower-layers")
        unused = [layer for layer in chosen if layer >= used]
        if unused and (len(unused) == len(chosen) or layers.strip() not in ("all", "upper")):
            raise UserError(f"--tower-layers {layers}: what layers {ranges(unused)} compute is not used by {base.path}")
        return tuple(layer for layer in chosen if layer < used)

    def prefixes(self, names: Iterable[str]) -> dict[int, str]:
        """Maps each layer of the tower to the prefix of its MLP's tensors; {} without one."""
        return tower_prefixes(names)

    def layer_of(self, module: str) -> int | None:
        """Returns the layer of an MLP of the tower; None for other modules."""
        return layer_in(module, TOWER_MLP) if of_tower(module) else None

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns all that are known, as they are in memory and, in files, within layers around them."""
        return (*LAYOUTS, *(tuple(f"{name}.{INNER}" for name in layout) for layout in LAYOUTS))

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the MLPs of the tower for images"

    def words(self, where: Where, factor: int) -> str:
        """Returns what has grown, in words."""
        return f"the MLPs of {in_layers(where)} of the tower for images, {factor} times as wide"

    def stock_config(self, config: dict[str, Any], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Writes the width of the tower's MLPs."""
        prefix = next(iter(self.prefixes(base.tensors).values()), "")
        name = f"{prefix}.{self.on_disk(base, prefix)[-1]}.weight" if prefix else ""
        if not name or shapes[name] == base.tensors[name].shape:
            return config
        width, tower = shapes[name][1], config[_CONFIG]
        by_ratio = _RATIO in tower or str(tower.get("model_type")).startswith("dinov2")
        said = {_RATIO: width // shapes[name][0]} if by_ratio else {"intermediate_size": width}
        return {**config, _CONFIG: {**tower, **said}}


def _used_layers(config: dict[str, Any], count: int) -> int:
    """Returns how many layers of a tower a model uses: LLaVA reads what comes out of one below the last."""
    read = config.get("vision_feature_layer")
    places = [place for place in (read if isinstance(read, list) else [read]) if isinstance(place, int)]
    return max((place if place >= 0 else count + 1 + place for place in places), default=count)
