"""The names of tensors and layers: on disk, in memory, and in every layout of a checkpoint."""

import re
from collections.abc import Iterable

from grow.errors import UserError, unknown

VIT = ("intermediate.dense", "output.dense")
"""The matrices of a ViT's MLPs in files, which have no MLP in their names; in memory they are mlp.fc1 and mlp.fc2."""
LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),  # Gemma, Llama, Mistral, Qwen …
    ("gate_up_proj", "down_proj"),  # gate above up in one matrix: Phi 3 and 4, GLM 4
    ("up_proj", "down_proj"),  # without a gate: Arcee, Nemotron
    ("fc1", "fc2"),  # Phi 1 and 2
    ("c_fc", "c_proj"),  # GPT-2, StarCoder 2
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX and Pythia, Falcon
    ("fc_in", "fc_out"),  # GPT-J, CodeGen
    VIT,
)
"""The matrices of the MLPs that can grow, by their names in the classes; the last maps back to the hidden size."""
FUSED, DOWN = "gate_up_proj", ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", VIT[1])
ATTENTION = {"queries": ("q_proj", "o_proj"), "heads": ("q_proj", "k_proj", "v_proj", "o_proj")}
"""The matrices of attention that grow, by kind; as an MLP's, the last maps back to the hidden size. Query heads share
the keys and values that are there, whole heads have their own."""
QUERY, OUTPUT = "q_proj", "o_proj"
TRANSPOSED = ("gpt2",)
"""Kinds of model (model_type) whose matrices lie in the files as [in, out], transformers' Conv1D."""
LAYERS = "(?:layers?|h)"
"""What the list of layers is called in the classes, a regular expression."""
MATRICES = tuple(dict.fromkeys(name for layout in LAYOUTS for name in layout))
INNER = "linear"
"""What the matrix is called in a layer around it, such as Gemma 4's towers have: gate_proj.linear.weight."""
BOUNDS = ("input_min", "input_max", "output_min", "output_max")
"""What such a layer may clip by: one number each, which are the copies' as well."""
_MATRIX = "|".join(MATRICES)

_LAYER = rf"(?:.*\.)?{LAYERS}\.(\d{{1,6}})"
_MLP_KEY = re.compile(rf"({_LAYER}\.mlp)\.(?:{_MATRIX})\.weight", re.ASCII)
TOWER_MLP = "(?:mlp|feed_forward)"
"""What an MLP is called in the layers of a tower, a regular expression; Pixtral has a feed_forward."""
_TOWER_KEY = re.compile(rf"({_LAYER}\.{TOWER_MLP})\.(?:{_MATRIX})(?:\.{INNER})?\.weight", re.ASCII)
_VIT_KEY = re.compile(rf"({_LAYER})\.(?:{'|'.join(VIT)})\.weight", re.ASCII)
OTHER_TOWERS = re.compile(r"(?:^|\.)(?:vision|visual|audio|image|img)\w*\.")
VISION = "vision_tower"
"""What a tower for images is called in the classes whose towers can grow: Gemma 3, LLaVA and its kin."""
_BESIDE = ("multi_modal_projector", "embed_vision", "embed_audio", "embed_tokens_extend", "connector")
"""What leads from towers to a language model, beside what OTHER_TOWERS names."""
_PREDICTION = re.compile(r"(?:^|\.)mtp\.")
"""Layers that predict several tokens, which classes pass over (Qwen 3.5)."""
_NOT_PLAIN = {
    ".experts.": "a mixture of experts", ".block_sparse_moe.": "a mixture of experts",
    ".qweight": "quantized weights",
    ".lora_A.": "an adapter (merge it first)",
}  # fmt: skip
_SKILLED = f"{_MATRIX}|{'|'.join(ATTENTION['heads'])}"  # what skills have, of which a name says whose it is
_ADDED = re.compile(rf"\.(grown|trained)\.(?:([A-Za-z0-9_-]+)\.(?=(?:{_SKILLED})\.))?")
_UP = {*MATRICES, *ATTENTION["heads"]} - {*DOWN, OUTPUT}
_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model|transformer|gpt_neox)\.)+")
_TOWER_WRAPPER = re.compile(r"^(vision_tower)\.vision_model\.")
_OTHER_NAMES = {
    "h": "layers", "wte": "embed_tokens", "embed_in": "embed_tokens", "word_embeddings": "embed_tokens",
    "ln_f": "norm", "final_layer_norm": "norm", "embed_out": "lm_head",
}  # fmt: skip
"""What GPT-2's, GPT-NeoX's and Falcon's classes call the parts of a model."""
VIT_COPIES = {
    f".{added}.{name}": f".mlp.{added}.fc{place}" for added in ("grown", "trained") for place, name in enumerate(VIT, 1)
}
"""What a ViT's copies are called in files, and in memory."""
_IN_TOWERS = {
    "attention.output.dense": "attention.o_proj", "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
    **VIT_COPIES, **{f".{name}": f".mlp.fc{place}" for place, name in enumerate(VIT, 1)}, ".encoder.layer.": ".layers.",
}  # fmt: skip
"""What the parts of a ViT's and a DINOv2's layers are called in files, and in transformers' classes."""


def mlp_prefixes(keys: Iterable[str]) -> dict[int, str]:
    """Maps each decoder layer that has an MLP of one of the LAYOUTS to the prefix of its keys, e.g. {3:
    "model.layers.3.mlp"}.

    Raises UserError, naming what was found instead, for models whose MLPs cannot be grown.
    """
    keys = [key for key in keys if not OTHER_TOWERS.search(key) and not _PREDICTION.search(key)]
    for pattern, what in _NOT_PLAIN.items():
        if any(pattern in key for key in keys):
            raise UserError(f"the model has {what}, which cannot be grown; a plain MLP is needed")
    prefixes = _prefixes(keys, _MLP_KEY)
    if not prefixes:
        raise UserError(
            "no MLP in it that can grow (layers.<i>.mlp.gate_proj, up_proj, down_proj, or another layout that "
            "grow/checkpoint/README.md names)"
        )
    return prefixes


def tower_prefixes(keys: Iterable[str]) -> dict[int, str]:
    """Maps each layer of the tower for images to the prefix of its MLP's keys, as mlp_prefixes does; {} without one."""
    keys = list(filter(of_tower, keys))
    return _prefixes(keys, _TOWER_KEY) or _prefixes(keys, _VIT_KEY)


def of_tower(name: str) -> bool:
    """Says whether a tensor or module is of a tower for images that is known here."""
    return VISION in name.split(".")


def _prefixes(keys: Iterable[str], pattern: re.Pattern[str]) -> dict[int, str]:
    found: dict[int, dict[str, set[str]]] = {}
    for key in keys:
        match = pattern.fullmatch(key)
        if match and not is_growth(key):
            found.setdefault(int(match[2]), {}).setdefault(match[1], set()).add(key)
    prefixes = {}
    for layer, by_prefix in sorted(found.items()):
        if len(by_prefix) > 1:
            raise UserError(f"layer {layer} stands in it twice ({', '.join(by_prefix)}): which is the decoder?")
        ((prefixes[layer], names),) = by_prefix.items()
        there = set(map(matrix_of, names))
        if there not in map(set, LAYOUTS):
            near = next(layout for layout in LAYOUTS if there & set(layout))
            raise UserError(f"{prefixes[layer]} lacks one of {', '.join(near)}: the checkpoint is incomplete")
    return prefixes


def check_matrices(field: str, wanted: Iterable[str], keys: Iterable[str]) -> None:
    """Raises UserError for the name of a matrix, such as gate_proj, that no decoder layer has; a recipe's `field` names
    it."""
    layers = (re.match(r"layers\.\d+\..*?(\w+)\.weight$", canonical(key)) for key in keys if not is_growth(key))
    there = dict.fromkeys(match[1] for match in layers if match and not match[1].endswith("norm"))
    for name in wanted:
        if name not in there:
            raise UserError(f"{field}: {unknown(name, there, 'matrix of a decoder layer')}")


def is_growth(key: str) -> bool:
    """Says whether a tensor of a grown checkpoint was added by growth: a copy, or an up-projection that g_train
    trained."""
    return is_copy(key) or is_trained_up(key)


def is_copy(key: str) -> bool:
    """Says whether a tensor is of an added copy, `….grown.…`."""
    return ".grown." in key


def is_trained_up(key: str) -> bool:
    """Says whether a tensor is of what g_train trained beside the base's own, `….trained.…`: gate and up, or q, k and
    v."""
    return ".trained." in key


def own_name(key: str) -> str:
    """Returns the name of the base's own tensor that an added one is a copy of."""
    return _ADDED.sub(".", key)


def is_down(key: str) -> bool:
    """Says whether a tensor is of a matrix that growth divides by k: the one that maps hidden units, or heads, back to
    the hidden size, or one that is copied as it is."""
    return matrix_of(key) not in _UP


def matrix_of(key: str) -> str:
    """Returns the name of the matrix that a tensor is of: gate_proj of `….gate_proj.weight`, and of
    `….gate_proj.linear.weight`."""
    name = key.rpartition(".")[0].removesuffix(f".{INNER}")
    return next((matrix for matrix in VIT if f".{name}".endswith(f".{matrix}")), name.rpartition(".")[2])


def skill_of(key: str) -> str:
    """Returns the skill that an added tensor belongs to, by its name `….mlp.grown.<skill>.gate_proj.weight`; "" where a
    single one has no name."""
    match = _ADDED.search(key)
    return (match[2] or "") if match else ""


def of_skill(key: str, skill: str) -> str:
    """Returns the name of an added tensor as that of a skill; of "", without a name."""
    return _ADDED.sub(lambda match: f".{match[1]}." + f"{skill}." * bool(skill), key)


def named_beside(key: str, own: str) -> str:
    """Returns the name of an added tensor beside the base's own tensor `own`, in the layout of its name; "" for ""."""
    match = _ADDED.search(key)
    assert match, key
    end = key[match.end() :]
    if own and matrix_of(own) in VIT:
        end = f"{matrix_of(own)}.{own.rpartition('.')[2]}"
    return f"{own.removesuffix(end)}{match[1]}.{end}" if own else ""


def canonical(key: str) -> str:
    """Returns the part of a tensor's name that all layouts of a model share.

    On disk a Gemma 3 4B is `language_model.model.layers.…` (hub) or `model.language_model.layers.…` (newer saves), in
    memory `model.language_model.layers.…`; a 1B is `model.layers.…`, a GPT-2 `h.…` (hub) or `transformer.h.…`. All
    become `layers.…`. Its tower is `vision_tower.vision_model.…` on the hub, and `vision_tower.…` in memory, where a
    ViT's layers have other names as well. PEFT calls what it wraps `….q_proj.base_layer`.
    """
    name = _TOWER_WRAPPER.sub(r"\1.", _WRAPPERS.sub("", key))
    if name.startswith(f"{VISION}."):
        for on_disk, in_memory in _IN_TOWERS.items():
            name = name.replace(on_disk, in_memory)
    first, dot, rest = name.partition(".")
    return (_OTHER_NAMES.get(first, first) + dot + rest).replace(".base_layer.", ".")


def layer_of(key: str) -> int | None:
    """Returns the decoder layer that a tensor or module belongs to, by its name; None if it belongs to none."""
    match = re.match(r"layers\.(\d{1,6})\.", canonical(key)) if of_language_model(key) else None
    return int(match[1]) if match else None


def of_language_model(name: str) -> bool:
    """Says whether a parameter or module is outside the towers for images and sound and their projectors, which text
    gives no gradient."""
    return not OTHER_TOWERS.search(f"{name}.") and not any(f"{part}." in name for part in _BESIDE)
