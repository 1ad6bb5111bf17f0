"""Heads of attention: query heads, which share the keys and values that are there, or whole heads with their own."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from grow.errors import UserError
from grow.names import ATTENTION, OTHER_TOWERS, QUERY, matrix_of, mlp_prefixes
from grow.parts.part import Base, Field, Part, check_floats, layer_in
from grow.plan import Where, text_config, with_text_config

TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Kinds of model (model_type) whose heads of attention can grow."""
SHARING = ("gemma3n_text", "gemma4_text")
"""Kinds whose query heads can grow: layers read the keys and values of others, or have values that are the keys."""
_KEY = "k_proj.weight"


class Attention(Part):
    """The heads of the decoder layers' attention, by a factor of 2."""

    name = "attention"
    made_of = "heads"
    kinds = tuple(ATTENTION)
    fields: ClassVar = {
        "attention": Field(
            "",
            '"queries" (query heads, which share the keys and values that are there) or "heads" (with keys and values '
            "of their own) are copied as well, or alone where --layers is not given.",
        ),
        "attention_layers": Field("", "The layers whose attention grows, written as in --layers; all if not given."),
    }
    reads_below = 1
    rate = 3.0  # recipes/study/attention.yaml, of query heads
    narrower = (
        "the attention of layers {} has fewer heads than the stock model's, which has one number, a divisor of its "
        "hidden size"
    )
    padding = "it with heads of zeros"

    def checked(self, base: Base, kind: str, layers: str, factor: int) -> tuple[int, ...]:
        """Returns the layers whose heads grow. Raises UserError where they cannot."""
        if factor != 2:
            raise UserError(f"--attention {kind}: grows by a factor of 2 alone, not of {factor}")
        model_type = text_config(base.config).get("model_type")
        if model_type in SHARING and kind == "heads":
            raise UserError(
                f"--attention heads: {base.path}: layers of {model_type} share keys and values; take --attention "
                "queries"
            )
        if model_type not in (*TYPES, *SHARING):
            raise UserError(
                f"--attention {kind}: {base.path}: the attention of {model_type} is not known here; that of "
                f"{', '.join((*TYPES, *SHARING))} is"
            )
        chosen, prefixes = super().checked(base, kind, layers, factor), self.prefixes(base.tensors)
        needed = ATTENTION["queries" if model_type in SHARING else "heads"]
        for layer in chosen:
            names = [f"{prefixes[layer]}.{name}.weight" for name in ATTENTION["heads"]]
            names = [name for name in names if name in base.tensors or matrix_of(name) in needed]
            shapes: list[tuple[int, ...]] = [base.tensors[name].shape if name in base.tensors else () for name in names]
            widths = {shape[1] for shape in (*shapes[:-1], shapes[-1][::-1]) if len(shape) == 2}
            if () in shapes or len(widths) != 1 or shapes[0][0] != shapes[-1][1] or len(set(shapes[1:-1])) > 1:
                raise UserError(f"{base.path}: {names[0]}, k_proj, v_proj and o_proj are {shapes}, which do not fit")
            head_counts(base, prefixes[layer])
            check_floats(base, prefixes[layer], names)
        return chosen

    def prefixes(self, names: Iterable[str]) -> dict[int, str]:
        """Maps each layer to the prefix of its attention's tensors."""
        return {layer: f"{mlp.removesuffix('.mlp')}.self_attn" for layer, mlp in mlp_prefixes(names).items()}

    def layer_of(self, module: str) -> int | None:
        """Returns the layer of an attention; None for other modules, and those of towers for images and sound."""
        return None if OTHER_TOWERS.search(module) else layer_in(module, "self_attn")

    def layouts(self, kind: str = "") -> Iterable[tuple[str, ...]]:
        """Returns the matrices of a kind; of all, if none is named."""
        return (ATTENTION[kind],) if kind else (ATTENTION["heads"], ATTENTION["queries"])

    def named(self, where: Where) -> str:
        """Returns what it is, in words."""
        return "the query heads" if where.kind == "queries" else "the heads"

    def must_be_alone(self, where: Where) -> str:
        """Returns why heads cannot be one of several skills; "" for query heads."""
        if where.kind == "queries":
            return ""
        return "heads with keys of their own cannot be one of several skills (query heads can)"

    def stock_widths(self, base: Base, units: dict[int, int]) -> dict[int, int]:
        """Returns the width of all query heads of each layer's stock attention, which are as many in each: classes of
        transformers want a number of heads that divides the hidden size, where the base's does."""
        prefixes = self.prefixes(base.tensors)
        sizes = {layer: head_counts(base, prefixes[layer])[2] for layer in units}
        own, most = head_counts(base, prefixes[0])[0], max(width // sizes[layer] for layer, width in units.items())
        hidden = base.tensors[f"{prefixes[0]}.{QUERY}.weight"].shape[1]
        fitting = (count for count in range(most, hidden + 1) if hidden % count == 0 and count % own == 0)
        count = next(fitting, most) if hidden % own == 0 else most
        return {layer: size * count for layer, size in sizes.items()}

    def groups(self, base: Base, prefix: str, kind: str) -> int:
        """Returns how many key heads there are: copies of queries stand beside those with which they share keys, whole
        heads in any order."""
        return head_counts(base, prefix)[1] if kind == "queries" else 1

    def stock_config(self, config: dict[str, Any], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Writes how many heads there are, and their size and the number of keys where all layers have one."""
        prefix = self.prefixes(base.tensors)[0]
        query = f"{prefix}.{QUERY}.weight"
        if query not in shapes or shapes[query] == base.tensors[query].shape:
            return config
        size = head_counts(base, prefix)[2]
        counts = {"num_attention_heads": shapes[query][0] // size}
        if text_config(base.config).get("model_type") not in SHARING:  # else each kind of layer has its own
            counts |= {"head_dim": size, "num_key_value_heads": shapes[f"{prefix}.k_proj.weight"][0] // size}
        return with_text_config(config, counts)


def head_counts(base: Base, prefix: str) -> tuple[int, int, int]:
    """Returns how many query heads an attention has, how many of keys, and the features of each, from its tensors:
    configs on the hub may leave out what is their class's default. Raises UserError where they do not tell."""
    text, norm = text_config(base.config), base.tensors.get(f"{prefix}.q_norm.weight")
    queries = base.tensors[f"{prefix}.{QUERY}.weight"].shape[0]
    keys = base.tensors[f"{_with_keys(base, prefix)}.{_KEY}"].shape[0]
    heads = text.get("num_attention_heads")
    size = norm.shape[0] if norm else text.get("head_dim") or (heads and queries // heads)
    if not size or queries % size or keys % size:
        raise UserError(f"{base.path}: its config has no head_dim and num_attention_heads that fit {prefix}")
    return queries // size, keys // size, size


def _with_keys(base: Base, prefix: str) -> str:
    """Returns the prefix of the attention whose keys one reads: its own, or those of the last layer of its type below
    that has some. Raises UserError where there is none."""
    types, own = text_config(base.config).get("layer_types") or [], layer_in(prefix, "self_attn") or 0
    stem = prefix.removesuffix(f"{own}.self_attn")
    for layer in range(own, -1, -1):
        alike = layer == own or (own < len(types) and types[layer] == types[own])
        if alike and f"{stem}{layer}.self_attn.{_KEY}" in base.tensors:
            return f"{stem}{layer}.self_attn"
    raise UserError(f"{base.path}: {prefix} has no {_KEY}, and its config does not say whose keys it reads")
