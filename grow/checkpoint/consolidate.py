"""Consolidation: a training run or a grown checkpoint becomes a stock checkpoint that loads anywhere, or a grown one.

In a stock checkpoint, the gate and up of the base and of the copies are concatenated by rows, and the down-projections
by columns as [D/k, D'], so the model's intermediate_size is k·p. Master weights are rounded once. A block of rows is in
memory at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from grow.checkpoint.card import stock_card
from grow.checkpoint.dtypes import is_float
from grow.checkpoint.elsewhere import check_program
from grow.checkpoint.expand import link_again
from grow.checkpoint.growable import head_counts, is_transposed, layout_of, projection_of
from grow.checkpoint.lazy import LazyTensor, interpolated
from grow.checkpoint.metadata import read_growth, write_metadata
from grow.checkpoint.one_skill import has_skills_at, plans_of
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import SINGLE_NAME, Checkpoint, read_json
from grow.checkpoint.stock_mlp import Blocks, Grown, blocks, grouped, hidden_units, stock_heads, stock_matrix, stock_mlp
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_skills, load_trained
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, MAX_SHARD_SIZE, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import (
    ATTENTION,
    PROJECTOR,
    QUERY,
    attention_prefix,
    is_growth,
    mlp_prefixes,
    named_beside,
    of_skill,
    tower_prefixes,
)
from grow.plan import GrowthPlan, mlp_widths, setting, text_config, width_key

FORMATS = ("stock", "grown")
_SCORES = (
    "loss",
    "token_accuracy",
    "exact_match",
    "log_likelihood",
    "rows",
)  # the scores that a card shows; those of single rows are left out
_CHAT_TEMPLATE = "chat_template.jinja"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def consolidate(
    path: str,
    out: str,
    format: str = "stock",
    uniform: bool = False,
    alpha: float = 1.0,
    dtype: str = "",
    max_shard_size: str = "",
    start: str = "",
    tag: str = "",
    average: int = 0,
    scores: str = "",
    without_switch: bool = False,
    program: str = "",
    progress: Progress = no_progress,
    export: ExportFunction = as_trained,
) -> dict[str, Any]:
    """Writes OUT. Raises UserError if the source cannot be made into that, or if OUT is there.

    `uniform`: where only some layers are grown, the others get neurons that are zero, which changes nothing they
    compute, so that one intermediate_size holds for all. `alpha`: the interpolation coefficient, folded into the
    weights: 0 is the base, 1 as trained; for a run without growth the weights are interpolated with the base's.
    `dtype`: a float type other than the base's. `start`, `tag`, `average`, `export`: see load_trained. `scores`: a file
    that `eval --out` wrote, for the model card. `without_switch`: write a stock checkpoint although what was trained
    has a switch, which is then always on. `program`: refuse what is known to compute something else there
    (grow.checkpoint.elsewhere), before anything is written.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: there are {' and '.join(FORMATS)}")
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha {alpha}: it lies between 0 (the base) and 1 (as trained)")
    if dtype and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: there are {', '.join(_DTYPES)}")
    if format == "grown" and (alpha != 1 or dtype):
        raise UserError(
            "--alpha and --dtype are for stock checkpoints: a grown one keeps its base, and can be loaded at any α"
        )
    if format == "grown" and program:
        raise UserError(f"--for {program}: takes stock checkpoints")
    size = parse_size("--max-shard-size", max_shard_size or {"stock": MAX_SHARD_SIZE}.get(format, GROWTH_SHARD_SIZE))
    refuse_existing(Path(out))
    skills = format == "stock" and not start and has_skills_at(path)
    source = load_skills(path) if skills else load_trained(path, start, tag, average, export)
    if source.has_switch and format == "stock" and not without_switch:
        raise UserError(
            f"{path}: has a switch, and a stock file cannot have one: --format grown keeps it, --without-switch writes "
            "the skill as it is when it is on"
        )
    if scores:
        source.scores = {
            part: {key: value for key, value in found.items() if key in _SCORES}
            for part, found in read_json(Path(scores)).items()
            if part in ("task", "retention")
        }
    if format == "grown":
        if source.plan is None:
            raise UserError(f"{path}: was not trained by growth, so there is nothing to keep grown; use --format stock")
        written = write_grown(source, out, size, progress)
    else:
        plans = plans_of(source.start.config)
        tensors = stock_tensors(source, plans, uniform, alpha, _DTYPES.get(dtype))
        if program:
            source.facts["note"] = check_program(program, path, stock_config(source, tensors))
        written = _write_stock(source, plans, out, tensors, alpha, dtype, size, progress)
    return {"source": path, "out": out, "format": format, "alpha": alpha, "bytes": written, **source.facts}


def stock_tensors(
    source: TrainedWeights, plans: Mapping[str, GrowthPlan], uniform: bool, alpha: float, dtype: str | None
) -> dict[str, LazyTensor]:
    """Returns the tensors of a stock checkpoint at an interpolation coefficient, by the names that the start has.

    `plans` are those of the skills by name; a single one's is "". `dtype` is safetensors' name of a float type; None
    keeps the start's. Raises UserError where layers would differ in width and `uniform` does not pad them.
    """
    start = source.start
    prefixes = mlp_prefixes(start.tensors) if plans else {}
    mlps = _mlps(
        source, plans, prefixes, partial(_widths, start.config), uniform, alpha, dtype,
        "layers {} are not grown as wide as others, and stock models have one width", "them with zeros",
    )  # fmt: skip
    mlps |= _tower(source, plans, uniform, alpha, dtype) | _heads(source, plans, prefixes, uniform, alpha, dtype)
    mlps |= _projector(source, plans, alpha, dtype)
    tensors = {}
    for name, info in start.tensors.items():
        if name in mlps:
            tensors[name] = mlps[name]
        elif not is_growth(name):
            target = dtype if dtype and is_float(info.dtype) else info.dtype
            tensors[name] = interpolated(start.lazy(name), source.tensor(name), alpha, target)
    return tensors | _new_tensors(source, alpha, dtype)


def _tower(
    source: TrainedWeights, plans: Mapping[str, GrowthPlan], uniform: bool, alpha: float, dtype: str | None
) -> dict[str, LazyTensor]:
    """Returns the stock form of a tower's MLPs, if some have grown."""
    towers = {name: dataclasses.replace(plan, layers=plan.tower, alphas=()) for name, plan in plans.items()}
    if not any(plan.tower for plan in towers.values()):
        return {}
    return _mlps(
        source, towers, tower_prefixes(source.start.tensors), lambda units: dict.fromkeys(units, max(units.values())),
        uniform, alpha, dtype, "layers {} of the tower are not grown as wide as others, and it has one width",
        "with zeros",
    )  # fmt: skip


def _mlps(
    source: TrainedWeights,
    plans: Mapping[str, GrowthPlan],
    prefixes: dict[int, str],
    widths_of: Callable[[dict[int, int]], dict[int, int]],
    uniform: bool,
    alpha: float,
    dtype: str | None,
    problem: str,
    padding: str,
) -> dict[str, LazyTensor]:
    """Returns the stock form of the MLPs with these key prefixes, each as wide as `widths_of` makes of their hidden
    units; `problem` and `padding` are for _check_padded."""
    made = {layer: _blocks(source, plans, layer, prefix, alpha, dtype) for layer, prefix in prefixes.items()}
    transposed = is_transposed(source.start.config)
    units = {layer: hidden_units(parts, transposed) for layer, parts in made.items()}
    widths = widths_of(units)
    _check_padded([layer for layer, count in units.items() if count < widths[layer]], uniform, problem, padding)
    found: dict[str, LazyTensor] = {}
    for layer, parts in made.items():
        own = next(iter(parts[0][0].values()))
        joined = stock_mlp(parts, widths[layer], dtype or own.dtype, transposed)
        found |= {f"{prefixes[layer]}.{end}": tensor for end, tensor in joined.items()}
    return found


def _projector(
    source: TrainedWeights, plans: Mapping[str, GrowthPlan], alpha: float, dtype: str | None
) -> dict[str, LazyTensor]:
    """Returns the stock form of a projector that has trained."""
    name = projection_of(source.start)
    if name is None or not any(plan.projector for plan in plans.values()):
        return {}
    own, copy = source.start.lazy(name), source.tensor(named_beside(f"{PROJECTOR}.grown.", name))
    target = dtype or own.dtype
    return stock_matrix(blocks({name: own}, [Grown(2, alpha, {name: copy}, {})], target), target)


def _heads(
    source: TrainedWeights,
    plans: Mapping[str, GrowthPlan],
    prefixes: dict[int, str],
    uniform: bool,
    alpha: float,
    dtype: str | None,
) -> dict[str, LazyTensor]:
    """Returns the stock form of heads that have grown."""
    heads = {name: dataclasses.replace(plan, layers=plan.attention, alphas=()) for name, plan in plans.items()}
    kind = next((plan.attention_kind for plan in heads.values() if plan.attention), "")
    if not kind:
        return {}
    names = {layer: attention_prefix(prefix) for layer, prefix in prefixes.items()}
    made = {layer: _blocks(source, heads, layer, own, alpha, dtype, ATTENTION[kind]) for layer, own in names.items()}
    units = {layer: hidden_units(parts, False) for layer, parts in made.items()}
    width = _whole_heads(source.start, names[0], max(units.values()))
    narrow = [layer for layer, count in units.items() if count < width]
    _check_padded(
        narrow,
        uniform,
        "the attention of layers {} has fewer heads than the stock model's, which has one number, a divisor of its "
        "hidden size",
        "it with heads of zeros",
    )
    found: dict[str, LazyTensor] = {}
    for layer, parts in made.items():
        # Copies of queries stand beside those with which they share keys; whole heads in any order.
        groups = head_counts(source.start, names[layer])[1] if kind == "queries" else 1
        own_type = dtype or next(iter(parts[0][0].values())).dtype
        joined = stock_heads(grouped(parts, groups, width), own_type)
        found |= {f"{names[layer]}.{end}": tensor for end, tensor in joined.items()}
    return found


def _whole_heads(start: Checkpoint, prefix: str, width: int) -> int:
    """Returns the width of all query heads of a stock attention, which is to have a width at least: classes of
    transformers want a number of heads that divides the hidden size, where the base's does."""
    own, _, size = head_counts(start, prefix)
    hidden = start.tensors[f"{prefix}.{QUERY}.weight"].shape[1]
    more = range(width // size, hidden + 1)
    fitting = (count for count in more if hidden % count == 0 and count % own == 0)
    return size * next(fitting, width // size) if hidden % own == 0 else width


def _check_padded(narrow: list[int], uniform: bool, problem: str, padding: str) -> None:
    """Raises UserError where layers are narrower than the stock model has them and `uniform` does not pad them."""
    if narrow and not uniform:
        raise UserError(f"{problem.format(narrow)}: add --uniform to pad {padding}")


def _widths(config: dict[str, Any], units: dict[int, int]) -> dict[int, int]:
    """Returns the width of each layer's stock MLP, which has so many hidden units at least: its own where the config
    has a list of them, else one for all; or, in Gemma 4, one for layers with keys of their own and twice as much for
    others."""
    own, size = mlp_widths(config, len(units)), setting(text_config(config), "intermediate_size")
    if isinstance(size, list):
        return units
    times = {layer: own[layer] // size if own and size else 1 for layer in units}
    one = max((-(-count // times[layer]) for layer, count in units.items()), default=0)
    return {layer: one * times[layer] for layer in units}


def _blocks(
    source: TrainedWeights,
    plans: Mapping[str, GrowthPlan],
    layer: int,
    prefix: str,
    alpha: float,
    dtype: str | None,
    layout: tuple[str, ...] = (),
) -> Blocks:
    """Returns the blocks of a layer's MLP; or of what has the matrices of another layout."""
    start = source.start
    ends = [f"{name}.{part}" for name in layout or layout_of(start, prefix) for part in ("weight", "bias")]
    own = {end: start.lazy(f"{prefix}.{end}") for end in ends if f"{prefix}.{end}" in start.tensors}
    skills = [
        Grown(
            plan.factor,
            alpha * plan.own_alpha(layer),
            {end: source.tensor(of_skill(f"{prefix}.grown.{end}", name)) for end in own},
            _trained(source, prefix, name, list(own)),
        )
        for name, plan in plans.items()
        if layer in plan.layers
    ]
    return blocks(own, skills, dtype or next(iter(own.values())).dtype)


def _trained(source: TrainedWeights, prefix: str, skill: str, ends: list[str]) -> dict[str, LazyTensor]:
    names = {end: of_skill(f"{prefix}.trained.{end}", skill) for end in ends}
    return {
        end: source.tensor(name)
        for end, name in names.items()
        if name in source.start.tensors or name in source.trained
    }


def _new_tensors(source: TrainedWeights, alpha: float, dtype: str | None) -> dict[str, LazyTensor]:
    """Returns the tensors that a method has added and the base has no counterpart for, in the base's dtype."""
    known = source.start.tensors
    new = {name: tensor for name, tensor in source.trained.items() if name not in known and not is_growth(name)}
    if new and alpha != 1:
        raise UserError(f"--alpha {alpha:g}: the base has no {next(iter(new))} to interpolate with")
    own = next(info.dtype for info in known.values() if is_float(info.dtype))
    return {name: tensor.to(dtype or own) for name, tensor in new.items()}


def _write_stock(
    source: TrainedWeights,
    plans: Mapping[str, GrowthPlan],
    out: str,
    tensors: dict[str, LazyTensor],
    alpha: float,
    dtype: str,
    max_shard_size: int,
    progress: Progress,
) -> int:
    start = source.start
    growth, config = start.config.get("growth"), stock_config(source, tensors)
    if dtype:
        config = _with_dtype(config, dtype)
    shards = split_into_shards(tensors, max_shard_size, "model")
    if len(shards) == 1:
        shards = {SINGLE_NAME: tensors}
    alphas = [alpha, *(plan.alphas for plan in plans.values())]
    request = [source.identity, "stock", alphas, dtype, {name: list(part) for name, part in shards.items()}]
    with OutputFolder(out, {"request": request}) as folder:
        folder.write_shards(shards, progress)
        for file in side_files(start.path):
            if file.name != _CHAT_TEMPLATE or not source.chat_template:
                folder.copy(file)
        if source.chat_template:
            folder.write_text(_CHAT_TEMPLATE, source.chat_template)
        if len(shards) > 1:
            folder.write_index(files_of(shards), {name: tensor.nbytes for name, tensor in tensors.items()})
        folder.write_text("README.md", stock_card(source.base_facts(), growth, source.facts, source.scores, alpha))
        folder.write_json("config.json", config)
    return sum(tensor.nbytes for tensor in tensors.values())


def stock_config(source: TrainedWeights, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Returns the config of a stock checkpoint with these tensors: without growth, and with the width of its MLPs."""
    start = source.start
    config = {key: value for key, value in (source.config or start.config).items() if key != "growth"}
    if "growth" not in start.config:
        return config
    text, prefixes = dict(text_config(config)), mlp_prefixes(start.tensors).values()
    axis = 0 if is_transposed(config) else 1
    widths = [tensors[f"{prefix}.{layout_of(start, prefix)[-1]}.weight"].shape[axis] for prefix in prefixes]
    before, size = mlp_widths(start.config, len(widths)), setting(text, "intermediate_size")
    one_for_all = widths[0] if before is None else widths[0] * (size if isinstance(size, int) else 1) // before[0]
    text[width_key(text)] = widths if isinstance(size, list) else one_for_all
    query = f"{attention_prefix(next(iter(prefixes)))}.{QUERY}.weight"
    if query in tensors and tensors[query].shape != start.tensors[query].shape:
        text["head_dim"] = head_counts(start, attention_prefix(next(iter(prefixes))))[2]
        text["num_attention_heads"] = tensors[query].shape[0] // text["head_dim"]
        keys = tensors[query.replace(QUERY, "k_proj")]
        text["num_key_value_heads"] = keys.shape[0] // text["head_dim"]
    tower = next((f"{p}.{layout_of(start, p)[-1]}.weight" for p in tower_prefixes(start.tensors).values()), "")
    if tower and tensors[tower].shape != start.tensors[tower].shape:
        config["vision_config"] = {**config["vision_config"], "intermediate_size": tensors[tower].shape[1]}
    return {**config, "text_config": text} if "text_config" in config else text


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the config with its dtype (older ones call it torch_dtype) replaced, also where its parts name one."""
    return {
        key: dtype if key in ("dtype", "torch_dtype") and value is not None
        else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in config.items()
    }  # fmt: skip


def write_grown(source: TrainedWeights, out: str, max_shard_size: int, progress: Progress = no_progress) -> int:
    """Writes the growth as trained beside the base's shards, which are linked. Returns the growth's bytes."""
    start, known = source.start, read_growth(source.start.path)
    added = source.growth()
    shards = split_into_shards(added, max_shard_size, "growth")
    with OutputFolder(out, {"request": [source.identity, "grown", list(shards)]}) as folder:
        link_again(folder, start, (shard for shard in start.shards if not shard.name.startswith("growth-")))
        checksums = folder.write_shards(shards, progress)
        weight_map = {name: info.file.name for name, info in start.tensors.items() if not is_growth(name)}
        weight_map |= files_of(shards)
        sizes = {name: info.nbytes for name, info in start.tensors.items()}
        folder.write_index(weight_map, sizes | {name: tensor.nbytes for name, tensor in added.items()})
        write_metadata(folder, known | source.growth_facts() | {"tensors": checksums}, start.config)
    return sum(tensor.nbytes for tensor in added.values())
