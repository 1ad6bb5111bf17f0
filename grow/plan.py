"""GrowthPlan: what grows, in which layers, by which factor. It stands in a grown checkpoint's config.json under
"growth"."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grow.errors import UserError

FORMAT_VERSION, SKILLS_VERSION, ATTENTION_VERSION, TOWER_VERSION, PARTS_VERSION = 1, 2, 3, 4, 5
_KNOWN = (FORMAT_VERSION, ATTENTION_VERSION, TOWER_VERSION, PARTS_VERSION)
_COUPLED = "the MLP keeps its largest neurons alone (activation_sparsity_pattern)"
MAX_FACTOR = 64  # a larger one is a typing error, or malicious


@dataclass(frozen=True)
class Where:
    """Says where a kind of part (grow.parts) grows: in which layers, ascending, and which kind of it. What has no
    layers is layer 0."""

    layers: tuple[int, ...]
    kind: str = ""


@dataclass(frozen=True)
class GrowthPlan:
    """Says what of a model has added copies.

    `factor` is k: the MLP's hidden width becomes k·intermediate_size, the base's own and k−1 added copies. `layers` are
    the indices of the decoder layers whose MLPs have grown, ascending. `trained_up` says that what has grown holds
    trained up-projections, made by g_train, beside its own. `alphas` has the coefficient that each of these layers has
    at α = 1; if it is empty, that is 1. `beside` says what else has grown, by the names of grow.parts. `alpha` is the
    coefficient, at α = 1, of one of several skills.
    """

    factor: int
    layers: tuple[int, ...]
    trained_up: bool = False
    alphas: tuple[float, ...] = ()
    beside: Mapping[str, Where] = field(default_factory=dict)
    alpha: float = 1.0

    @property
    def parts(self) -> dict[str, Where]:
        """Returns all that grows, by name, the MLPs of the decoder layers among it."""
        return ({"mlps": Where(self.layers)} if self.layers else {}) | dict(self.beside)

    def own_alpha(self, part: str, layer: int) -> float:
        """Returns the factor that α is multiplied by in a layer's part, by the name of its kind."""
        by_layer = self.alphas and part == "mlps"
        return self.alpha * (self.alphas[self.layers.index(layer)] if by_layer else 1.0)

    def facts(self) -> dict[str, Any]:
        """Returns what the "growth" object of a checkpoint's config says of it before training."""
        facts: dict[str, Any] = {"format_version": FORMAT_VERSION, "factor": self.factor, "layers": list(self.layers)}
        beside = {name: {"kind": where.kind, "layers": list(where.layers)} for name, where in self.beside.items()}
        if set(beside) == {"attention"}:
            return facts | {"format_version": ATTENTION_VERSION} | beside
        return facts | ({"format_version": PARTS_VERSION, "parts": beside} if beside else {})

    def as_expanded(self) -> "GrowthPlan":
        """Returns the plan as it was before training, and before layers got an α of their own."""
        return replace(self, trained_up=False, alphas=(), alpha=1.0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GrowthPlan | None":
        """Reads the "growth" object of a checkpoint's config; None if the checkpoint is not grown."""
        growth = config.get("growth")
        if growth is None:
            return None
        version = growth.get("format_version") if isinstance(growth, dict) else growth
        if version == SKILLS_VERSION:
            raise UserError(
                f"it holds several skills ({', '.join(growth.get('skills', {}))}), which this does not work on; take "
                "one out (grow growth SOURCE OUT --name SKILL), and attach it alone"
            )
        if version not in _KNOWN:
            raise UserError(
                f"growth format version {version!r} is not known here "
                f"(those up to {max(_KNOWN)} are): use the release that wrote the checkpoint"
            )
        try:
            factor, layers = parse_factor(growth["factor"]), _ascending(growth["layers"])
            beside = {name: Where(_ascending(own["layers"]), own["kind"]) for name, own in _beside(growth).items()}
            kinds = [where.kind for where in beside.values()]
            if not all(isinstance(kind, str) for kind in kinds) or not (layers or beside):
                raise ValueError
            alphas = tuple(float(alpha) for alpha in growth.get("alphas", ()))
            if len(alphas) not in (0, len(layers)) or not all(0 <= alpha <= 1 for alpha in alphas):
                raise ValueError
            return cls(factor, layers, bool(growth.get("trained_up")), alphas, beside)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, UserError):
            raise UserError(
                "the growth in the checkpoint's config.json has no factor and layers that make sense"
            ) from None


def _beside(growth: dict[str, Any]) -> dict[str, Any]:
    """Returns what a "growth" object says of other parts than MLPs, in any version of the format."""
    version = growth["format_version"]
    if version == PARTS_VERSION:
        parts: dict[str, Any] = growth["parts"]
        if not parts:
            raise ValueError
        return parts
    known = version == ATTENTION_VERSION or (version == TOWER_VERSION and "attention" in growth)
    found = {"attention": growth["attention"]} if known else {}
    if version == TOWER_VERSION:
        found |= {"tower": {"kind": "vision", "layers": growth["tower"]}} if growth["tower"] else {}
        found |= {"projector": {"kind": "", "layers": [0]}} if growth["projector"] else {}
    return found


def _ascending(layers: Any) -> tuple[int, ...]:
    """Returns layers as a tuple. Raises ValueError unless they are a list of layers, each once, in order."""
    sound = isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)
    if not sound or layers != sorted(set(layers)):
        raise ValueError
    return tuple(layers)


def growth_of_skill(growth: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the "growth" object that one of several skills would have alone."""
    own = growth["skills"][name]
    version = ATTENTION_VERSION if "attention" in own else FORMAT_VERSION
    alone: dict[str, Any] = {"format_version": PARTS_VERSION if "parts" in own else version}
    for key, value in own.items():
        alone |= {} if key == "alpha" else {key: value}
        alone |= {"base": growth["base"]} if key == "trained" else {}  # where it stood before
    return alone


def skill_plans(growth: dict[str, Any] | None) -> dict[str, GrowthPlan]:
    """Returns the plans of several skills by name, each with its α, from the "growth" object of a config; {} if it has
    not several.

    Raises UserError as GrowthPlan.from_config does.
    """
    if growth is None or growth.get("format_version") != SKILLS_VERSION:
        return {}
    plans = {}
    for name in growth["skills"]:
        plan = GrowthPlan.from_config({"growth": growth_of_skill(growth, name)})
        assert plan is not None
        plans[name] = replace(plan, alpha=growth["skills"][name]["alpha"])
    return plans


def parse_factor(factor: int | str) -> int:
    """Checks k. Raises UserError unless it is a whole number from 2 to MAX_FACTOR."""
    try:
        k = int(factor)
    except ValueError:
        k = 0
    if not 2 <= k <= MAX_FACTOR or str(k) != str(factor).strip():
        raise UserError(f"--factor {factor}: a whole number of at least 2 (and at most {MAX_FACTOR}) is needed")
    return k


def parse_layers(layers: str, num_layers: int, option: str = "--layers") -> tuple[int, ...]:
    """Reads "all"; or "upper", those above a third of the depth; or indices and ranges such as "0,3,7-9" (both ends
    included); or the best n of a ranking's file,
    "top:6:ranking.json", which holds {"layers": [best, second, …]}, or its last n, "bottom:6:ranking.json". A
    checkpoint that learn-alphas wrote may take the file's place: it ranks its layers by their α, the largest first.

    Raises UserError for anything else, and for a layer that the model does not have.
    """
    text = str(layers).strip()
    if text == "all":
        return tuple(range(num_layers))
    if text == "upper":
        return tuple(range(-(-num_layers // 3), num_layers))
    chosen = _ranked(text, option) if text.startswith(("top:", "bottom:")) else _listed(text, option)
    if max(chosen) >= num_layers:
        raise UserError(f"{option} {text}: layer {max(chosen)} does not exist; the model has layers 0-{num_layers - 1}")
    return tuple(sorted(chosen))


def growing_layers(layers: str, num_layers: int, config: dict[str, Any]) -> tuple[int, ...]:
    """Returns which layers of a model with this config grow. "all" and "upper" leave out those whose neurons depend on
    each other (coupled_layers). Raises UserError as parse_layers does, and where such a layer is named."""
    chosen, coupled = parse_layers(layers, num_layers), coupled_layers(config, num_layers)
    if str(layers).strip() in ("all", "upper"):
        left = tuple(layer for layer in chosen if layer not in coupled)
        if not left:
            raise UserError(f"--layers {layers}: {_COUPLED}, in all of them, so nothing can grow")
        return left
    wrong = [layer for layer in chosen if layer in coupled]
    if wrong:
        raise UserError(f"--layers {layers}: {_COUPLED} in layers {ranges(wrong)}; leave these out")
    return chosen


def coupled_layers(config: dict[str, Any], num_layers: int) -> list[int]:
    """Returns the layers whose MLP keeps its largest neurons alone (`activation_sparsity_pattern`, Gemma 3n), by their
    mean and spread: there copies and originals would change each other."""
    pattern = text_config(config).get("activation_sparsity_pattern") or 0.0
    shares = pattern if isinstance(pattern, list) else [pattern] * num_layers
    return [layer for layer, share in enumerate(shares) if share]


def mlp_widths(config: dict[str, Any], num_layers: int) -> list[int] | None:
    """Returns the width that a config gives each layer's MLP; None if it gives none. `intermediate_size` is one for all
    or, in Gemma 3n, a list; in Gemma 4 layers that share the keys and values of others may be twice as wide. Raises
    UserError for anything else."""
    text = text_config(config)
    size = setting(text, "intermediate_size")
    if size is None:
        return None
    widths = size if isinstance(size, list) else [size] * num_layers
    if len(widths) != num_layers or not all(type(width) is int and width > 0 for width in widths):
        raise UserError(
            f"the config's intermediate_size {size!r} is not a width, or one for each of {num_layers} layers"
        )
    shared = int(text.get("num_kv_shared_layers") or 0) if text.get("use_double_wide_mlp") else 0
    return [width * (2 if layer >= num_layers - shared else 1) for layer, width in enumerate(widths)]


def _listed(text: str, option: str) -> set[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise UserError(
                f"{option} {text}: {part!r} is neither a layer nor a range; write all, upper, 0,3,7-9 or "
                "top:6:ranking.json"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{option} {text}: the range {part!r} runs backwards")
        chosen.update(range(first, last + 1))
    return chosen


def _ranked(text: str, option: str) -> set[int]:
    match = re.fullmatch(r"(top|bottom):(\d{1,6}):(.+)", text, re.ASCII)
    if match is None or not int(match[2]):
        raise UserError(f"{option} {text}: write top:N:FILE, such as top:6:ranking.json")
    end, count, file = match[1], int(match[2]), os.path.expanduser(os.path.expandvars(match[3]))
    try:
        ranked = _by_alpha(Path(file)) if Path(file).is_dir() else _read(Path(file))["layers"]
        chosen = ranked[:count] if end == "top" else ranked[-count:]
        layers = {layer for layer in chosen if type(layer) is int and layer >= 0}
    except OSError as error:
        raise UserError(f"{option} {text}: {file} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{option} {text}: {file} is not a ranking, {{"layers": [best, second, …]}}') from None
    if len(layers) < count:
        raise UserError(f"{option} {text}: {file} ranks only {len(layers)} layers")
    return layers


def _by_alpha(checkpoint: Path) -> list[int]:
    plan = GrowthPlan.from_config(_read(checkpoint / "config.json"))
    if plan is None or not plan.alphas:
        raise UserError(f"{checkpoint}: its layers have no α of their own; name what grow learn-alphas wrote")
    return sorted(plan.layers, key=lambda layer: plan.own_alpha("mlps", layer), reverse=True)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def ranges(layers: list[int]) -> str:
    """Writes layers as ranges: [0, 1, 2, 5] becomes "0-2, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


_OTHER_SETTINGS = {"num_hidden_layers": ("n_layer", "num_layers"), "hidden_size": ("n_embd",)}
"""What GPT-2, GPT-J and GPT-Neo call the settings of a config."""


def setting(text: dict[str, Any], name: str) -> Any:
    """Returns a setting of the language model's part of a config, whatever it is called there; None without it."""
    keys = (width_key(text),) if name == "intermediate_size" else (name, *_OTHER_SETTINGS[name])
    return next((text[key] for key in keys if text.get(key) is not None), None)


def width_key(text: dict[str, Any]) -> str:
    """Returns what the language model's part of a config calls the width of its MLPs, or would call it."""
    if "n_embd" in text:
        return "n_inner"
    return "ffn_hidden_size" if text.get("model_type") == "falcon" else "intermediate_size"


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the language model's part of a config: multimodal configs keep it under "text_config"."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def with_text_config(config: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config whose language model's part has other settings."""
    text = {**text_config(config), **settings}
    return {**config, "text_config": text} if "text_config" in config else text
