"""Consolidation: a training run or a grown checkpoint becomes a stock checkpoint that loads anywhere, or a grown one.

What a stock checkpoint is made of stands in stock.py and stock_mlp.py. A block of rows is in memory at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grow.checkpoint.card import stock_card
from grow.checkpoint.elsewhere import check_program
from grow.checkpoint.expand import link_again
from grow.checkpoint.lazy import LazyTensor
from grow.checkpoint.metadata import read_growth, write_metadata
from grow.checkpoint.one_skill import has_skills_at, plans_of
from grow.checkpoint.output import OutputFolder, Progress, no_progress, refuse_existing, side_files
from grow.checkpoint.shards import SINGLE_NAME, read_json
from grow.checkpoint.stock import stock_config, stock_tensors
from grow.checkpoint.trained_weights import ExportFunction, TrainedWeights, as_trained, load_skills, load_trained
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, MAX_SHARD_SIZE, files_of, parse_size, split_into_shards
from grow.errors import UserError
from grow.names import is_growth
from grow.plan import GrowthPlan

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
            source.facts["note"] = check_program(program, path, stock_config(source, tensors), tensors)
        written = _write_stock(source, plans, out, tensors, alpha, dtype, size, progress)
    return {"source": path, "out": out, "format": format, "alpha": alpha, "bytes": written, **source.facts}


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
    alphas = [alpha, *((plan.alpha, plan.alphas) for plan in plans.values())]
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
