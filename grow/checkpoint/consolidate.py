"""Consolidation: a training run or a grown checkpoint becomes a stock checkpoint that loads anywhere, or a grown one.

In a stock checkpoint, the gate and up of the base and of the copies are concatenated by rows, and the down-projections
by columns as [D/k, D'], so the model's intermediate_size is k·p. Master weights are rounded once. A block of rows is in
memory at a time.
"""

import operator
from pathlib import Path
from typing import Any

from grow.checkpoint.card import stock_card
from grow.checkpoint.dtypes import is_float, widest
from grow.checkpoint.expand import link_again
from grow.checkpoint.lazy import LazyTensor, concat_columns, concat_rows, elementwise, interpolated, zeros
from grow.checkpoint.metadata import read_growth, write_metadata
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import SINGLE_NAME, read_json
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_trained
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, MAX_SHARD_SIZE, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import is_growth, mlp_prefixes
from grow.plan import GrowthPlan, text_config

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
    average: int = 1,
    scores: str = "",
    without_switch: bool = False,
    progress: Progress = no_progress,
    export: ExportFunction = as_trained,
) -> dict[str, Any]:
    """Writes OUT. Raises UserError if the source cannot be made into that, or if OUT is there.

    `uniform`: where only some layers are grown, the others get neurons that are zero, which changes nothing they
    compute, so that one intermediate_size holds for all. `alpha`: the interpolation coefficient, folded into the
    weights: 0 is the base, 1 as trained; for a run without growth the weights are interpolated with the base's.
    `dtype`: a float type other than the base's. `start`, `tag`, `average`, `export`: see load_trained. `scores`: a file
    that `eval --out` wrote, for the model card. `without_switch`: write a stock checkpoint although what was trained
    has a switch, which is then always on.
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
    size = parse_size("--max-shard-size", max_shard_size or {"stock": MAX_SHARD_SIZE}.get(format, GROWTH_SHARD_SIZE))
    refuse_existing(Path(out))
    source = load_trained(path, start, tag, average, export)
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
    plan = source.plan
    if format == "grown":
        if plan is None:
            raise UserError(f"{path}: was not trained by growth, so there is nothing to keep grown; use --format stock")
        written = write_grown(source, out, size, progress)
    else:
        tensors = stock_tensors(source, plan, uniform, alpha, _DTYPES.get(dtype))
        written = _write_stock(source, plan, out, tensors, alpha, dtype, size, progress)
    return {"source": path, "out": out, "format": format, "alpha": alpha, "bytes": written, **source.facts}


def stock_tensors(
    source: TrainedWeights, plan: GrowthPlan | None, uniform: bool, alpha: float, dtype: str | None
) -> dict[str, LazyTensor]:
    """Returns the tensors of a stock checkpoint at an interpolation coefficient, by the names that the start has.

    `dtype` is safetensors' name of a float type; None keeps the start's. Raises UserError where only some layers have
    grown and `uniform` does not pad the others.
    """
    start = source.start
    mlps = {}
    if plan is not None:
        prefixes = mlp_prefixes(start.tensors)
        others = sorted(set(prefixes) - set(plan.layers))
        if others and not uniform:
            raise UserError(
                f"layers {others} are not grown, and stock models have one width: add --uniform to pad them with zeros"
            )
        own = {layer: alpha * plan.own_alpha(layer) for layer in plan.layers}
        mlps = {prefix: own.get(layer) for layer, prefix in prefixes.items()}
    tensors = {}
    for name, info in start.tensors.items():
        prefix, _, last = name.rpartition(".mlp.")
        mlp = f"{prefix}.mlp"
        if is_growth(name):
            continue
        target = dtype if dtype and is_float(info.dtype) else info.dtype
        if plan is not None and mlp in mlps and "_proj." in last:
            tensors[name] = _merged(source, mlp, last, plan.factor, mlps[mlp], target)
        else:
            tensors[name] = interpolated(start.lazy(name), source.tensor(name), alpha, target)
    return tensors | _new_tensors(source, alpha, dtype)


def _new_tensors(source: TrainedWeights, alpha: float, dtype: str | None) -> dict[str, LazyTensor]:
    """Returns the tensors that a method has added and the base has no counterpart for, in the base's dtype."""
    known = source.start.tensors
    new = {name: tensor for name, tensor in source.trained.items() if name not in known and not is_growth(name)}
    if new and alpha != 1:
        raise UserError(f"--alpha {alpha:g}: the base has no {next(iter(new))} to interpolate with")
    own = next(info.dtype for info in known.values() if is_float(info.dtype))
    return {name: tensor.to(dtype or own) for name, tensor in new.items()}


def _merged(source: TrainedWeights, mlp: str, last: str, k: int, alpha: float | None, target: str) -> LazyTensor:
    """Returns a tensor of a stock MLP, from the base's own and the copies; `alpha` is None if it has not grown."""
    own = source.start.lazy(f"{mlp}.{last}")
    if alpha is None:
        own = own.to(target)
        if last == "down_proj.bias":
            return own
        if last == "down_proj.weight":
            return concat_columns(own, zeros((own.shape[0], own.shape[1] * (k - 1)), target))
        return concat_rows(own, zeros((own.shape[0] * (k - 1), *own.shape[1:]), target))
    copies = source.tensor(f"{mlp}.grown.{last}")
    if not last.startswith("down_proj"):
        trained = f"{mlp}.trained.{last}"
        if trained in source.start.tensors or trained in source.trained:
            return concat_rows(interpolated(own, source.tensor(trained), alpha, target), copies.to(target))
        return concat_rows(own.to(target), copies.to(target))
    own, added = _scaled(own, 1 - alpha * (k - 1) / k, target), _scaled(copies, alpha, target)
    return elementwise(operator.add, target, own, added) if last == "down_proj.bias" else concat_columns(own, added)


def _scaled(tensor: LazyTensor, factor: float, target: str) -> LazyTensor:
    """Scales a tensor in the wider of the two types, so that it is rounded once."""
    return tensor.to(widest(tensor.dtype, target)).scaled(factor).to(target)


def _write_stock(
    source: TrainedWeights,
    plan: GrowthPlan | None,
    out: str,
    tensors: dict[str, LazyTensor],
    alpha: float,
    dtype: str,
    max_shard_size: int,
    progress: Progress,
) -> int:
    start = source.start
    growth, config = start.config.get("growth"), stock_config(source, plan)
    if dtype:
        config = _with_dtype(config, dtype)
    shards = split_into_shards(tensors, max_shard_size, "model")
    if len(shards) == 1:
        shards = {SINGLE_NAME: tensors}
    alphas = [alpha, *(plan.alphas if plan else ())]
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


def stock_config(source: TrainedWeights, plan: GrowthPlan | None) -> dict[str, Any]:
    """Returns the config of a stock checkpoint: without growth, and with the width of the merged MLPs."""
    config = {key: value for key, value in (source.config or source.start.config).items() if key != "growth"}
    if plan is None:
        return config
    text = dict(text_config(config))
    text["intermediate_size"] = plan.factor * source.start.tensors[_gate(source)].shape[0]
    return {**config, "text_config": text} if "text_config" in config else text


def _gate(source: TrainedWeights) -> str:
    return next(iter(mlp_prefixes(source.start.tensors).values())) + ".gate_proj.weight"


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
