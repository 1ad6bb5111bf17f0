"""What of a base can grow: plain MLPs, also of a tower for images, and heads of attention that are known. All else is
refused in a line."""

from typing import Any

from grow.checkpoint.dtypes import is_float
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import check_not_quantized
from grow.errors import UserError, one_line
from grow.names import (
    ATTENTION,
    FUSED,
    LAYOUTS,
    PROJECTION,
    PROJECTOR,
    TRANSPOSED,
    VISION,
    attention_prefix,
    canonical,
    is_growth,
    mlp_prefixes,
    tower_prefixes,
)
from grow.plan import GrowthPlan, mlp_widths, parse_layers, ranges, setting, text_config

_WITHOUT_GATE, _ACTIVATIONS = ("arcee", "nemotron", "apertus", "jais2"), ("act_fn", "activation_fn", "act")
PARTS = ("weight", "bias")
"""What a matrix consists of."""
_NOT_ALONE = {
    "bloom": "its MLP adds what goes past it",
    "gpt_neox_japanese": "its config has no width of its own for the MLPs",
    "openai-gpt": "its class fixes the width of the MLPs",
}
"""Kinds of model (model_type) whose MLPs look plain by their tensors, and why they cannot grow."""
ATTENTION_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Kinds of model (model_type) whose heads of attention can grow."""
TOWERS = {"vision": "vision_config"}
"""The towers whose MLPs can grow, and where a config describes them."""


def checked_mlp_prefixes(checkpoint: Checkpoint) -> dict[int, str]:
    """Returns the key prefix of each layer's MLP. Raises UserError if one is missing or its shapes do not fit."""
    try:
        prefixes = mlp_prefixes(checkpoint.tensors)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    text = text_config(checkpoint.config)
    if text.get("model_type") in _NOT_ALONE:
        raise UserError(f"{checkpoint.path}: {text['model_type']}: {_NOT_ALONE[text['model_type']]}, so it cannot grow")
    count = setting(text, "num_hidden_layers") or len(prefixes)
    if list(prefixes) != list(range(len(prefixes))) or len(prefixes) != count:
        raise UserError(f"{checkpoint.path}: has MLPs in layers {list(prefixes)}, its config speaks of {count} layers")
    try:
        widths = mlp_widths(checkpoint.config, count)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    for layer, prefix in prefixes.items():
        width = widths[layer] if widths else None
        _check_shapes(checkpoint, prefix, setting(text, "hidden_size"), width, text.get("model_type"))
    return prefixes


def _check_shapes(
    base: Checkpoint, prefix: str, hidden_size: int | None, width: int | None, model_type: str | None
) -> None:
    layout = layout_of(base, prefix)
    if layout == ("up_proj", "down_proj") and model_type not in _WITHOUT_GATE:
        raise UserError(
            f"{base.path}: {prefix} lacks one of gate_proj, up_proj, down_proj: the checkpoint is incomplete"
        )
    for name in base.tensors:
        if (
            name.startswith(f"{prefix}.")
            and not is_growth(name)
            and name.split(".")[-2] not in (*layout, *_ACTIVATIONS)
        ):
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
    dtypes = {info.dtype for info in (*infos, *biases) if info is not None}
    if not is_float(infos[0].dtype) or len(dtypes) > 1:
        raise UserError(f"{base.path}: {prefix} is in {', '.join(sorted(dtypes))}; one float type is needed")


def is_transposed(config: dict[str, Any]) -> bool:
    """Says whether the matrices of a model with this config lie in its files as [in, out]."""
    return text_config(config).get("model_type") in TRANSPOSED


def layout_of(base: Checkpoint, prefix: str) -> tuple[str, ...]:
    """Returns the names of the matrices of an MLP."""
    return next(names for names in LAYOUTS if all(f"{prefix}.{name}.weight" in base.tensors for name in names))


def checked_attention(
    base: Checkpoint, plan: GrowthPlan, prefixes: dict[int, str], attention: str, layers: str
) -> tuple[int, ...]:
    """Returns the layers whose heads grow. Raises UserError where they cannot."""
    if attention not in ATTENTION:
        raise UserError(f"--attention {attention}: there are {' and '.join(ATTENTION)}")
    if plan.factor != 2:
        raise UserError(f"--attention {attention}: grows by a factor of 2 alone, not of {plan.factor}")
    text = text_config(base.config)
    if text.get("model_type") not in ATTENTION_TYPES:
        raise UserError(
            f"--attention {attention}: {base.path}: the attention of {text.get('model_type')} is not known here; that "
            f"of {', '.join(ATTENTION_TYPES)} is"
        )
    chosen = parse_layers(layers, len(prefixes), "--attention-layers")
    for layer in chosen:
        names = [f"{attention_prefix(prefixes[layer])}.{name}.weight" for name in ATTENTION["heads"]]
        shapes = [base.tensors[name].shape if name in base.tensors else () for name in names]
        widths = {shape[1] for shape in (*shapes[:-1], shapes[-1][::-1]) if len(shape) == 2}
        if () in shapes or len(widths) != 1 or shapes[0][0] != shapes[-1][1] or shapes[1] != shapes[2]:
            raise UserError(f"{base.path}: {names[0]}, k_proj, v_proj and o_proj are {shapes}, which do not fit")
        head_counts(base, attention_prefix(prefixes[layer]))
    return chosen


def checked_tower(base: Checkpoint, tower: str, layers: str) -> tuple[int, ...]:
    """Returns the layers of the tower for images whose MLPs grow. Raises UserError where they cannot."""
    if tower not in TOWERS:
        raise UserError(f"--tower {tower}: there is {' and '.join(TOWERS)}")
    prefixes, config = tower_prefixes(base.tensors), base.config.get(TOWERS[tower])
    if not isinstance(config, dict) or not any(VISION in name.split(".") for name in base.tensors):
        raise UserError(f"--tower {tower}: {base.path} has no tower for images ({VISION}) that is known here")
    count = config.get("num_hidden_layers")
    if list(prefixes) != list(range(len(prefixes))) or not prefixes or len(prefixes) != count:
        raise UserError(
            f"--tower {tower}: {base.path}: a plain MLP in each of its {count} layers is needed, and there are "
            f"{len(prefixes)} that can grow"
        )
    for prefix in prefixes.values():
        _check_shapes(base, prefix, config.get("hidden_size"), config.get("intermediate_size"), None)
    used = _used_layers(base.config, len(prefixes))
    chosen = parse_layers(layers, len(prefixes), "--tower-layers")
    unused = [layer for layer in chosen if layer >= used]
    if unused and str(layers).strip() not in ("all", "upper"):
        raise UserError(f"--tower-layers {layers}: what layers {ranges(unused)} compute is not used by {base.path}")
    return tuple(layer for layer in chosen if layer < used)


def _used_layers(config: dict[str, Any], count: int) -> int:
    """Returns how many layers of a tower a model uses: LLaVA reads what comes out of one below the last."""
    read = config.get("vision_feature_layer")
    places = [place for place in (read if isinstance(read, list) else [read]) if isinstance(place, int)]
    return max((place if place >= 0 else count + 1 + place for place in places), default=count)


def check_projector(base: Checkpoint) -> None:
    """Raises UserError if a base has no projector that can train with its base kept."""
    name = projection_of(base)
    if name is None or len(base.tensors[name].shape) != 2 or not is_float(base.tensors[name].dtype):
        raise UserError(f"train_projector: {base.path} has no projector that is known here ({PROJECTOR}.{PROJECTION})")


def projection_of(base: Checkpoint) -> str | None:
    """Returns the name of the matrix of a base's projector; None without one."""
    return next((name for name in base.tensors if name.endswith(f"{PROJECTOR}.{PROJECTION}")), None)


def head_counts(checkpoint: Checkpoint, prefix: str) -> tuple[int, int, int]:
    """Returns how many query heads an attention has, how many of keys, and the features of each, from its tensors:
    configs on the hub may leave out what is their class's default. Raises UserError where they do not tell."""
    text, norm = text_config(checkpoint.config), checkpoint.tensors.get(f"{prefix}.q_norm.weight")
    queries, keys = (checkpoint.tensors[f"{prefix}.{name}.weight"].shape[0] for name in ATTENTION["heads"][:2])
    heads = text.get("num_attention_heads")
    size = norm.shape[0] if norm else text.get("head_dim") or (heads and queries // heads)
    if not size or queries % size or keys % size:
        raise UserError(f"{checkpoint.path}: its config has no head_dim and num_attention_heads that fit {prefix}")
    return queries // size, keys // size, size


def check_copies(base: Checkpoint, copies: Checkpoint, plan: GrowthPlan, prefixes: dict[int, str]) -> None:
    """Raises UserError if a checkpoint's MLPs cannot stand in for the base's."""
    if "growth" in copies.config:
        raise UserError(f"--copies-from {copies.path}: is grown; give a stock checkpoint")
    check_not_quantized(copies)
    there = {canonical(name): info for name, info in copies.tensors.items()}
    for layer in plan.layers:
        parts = [f"{prefixes[layer]}.{name}.{part}" for name in layout_of(base, prefixes[layer]) for part in PARTS]
        for name in parts:
            own, found = base.tensors.get(name), there.get(canonical(name))
            if (own and own.shape) != (found and found.shape):
                said, wanted = (f"is {list(one.shape)}" if one else "is missing" for one in (found, own))
                raise UserError(
                    f"--copies-from {copies.path}: {name} {said}, the base's {wanted}; the copies need an MLP of the "
                    "same shape, such as that of another training of the base"
                )
