"""Growth for models that are loaded already, and for a training loop of one's own: what `import grow` offers.

The formats are those of the commands: `grow attach` reads packages that `save_growth` wrote, and `attach` reads
packages that `grow growth` or a run wrote.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn
from transformers import PreTrainedModel

from grow.checkpoint.card import base_facts
from grow.checkpoint.copies import added_tensors
from grow.checkpoint.expand import base_identity
from grow.checkpoint.growable import make_plan
from grow.checkpoint.hub import locate
from grow.checkpoint.metadata import without_checksums, write_growth
from grow.checkpoint.output import OutputFolder, no_progress, refuse_existing, side_files
from grow.checkpoint.package import check_base_tensors, matches, open_package
from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.stock import stock_config, stock_tensors
from grow.checkpoint.trained_weights import TrainedWeights
from grow.checkpoint.writer import GROWTH_SHARD_SIZE, checksum, parse_size, split_into_shards
from grow.errors import UserError, unknown
from grow.methods import METHODS
from grow.methods.g_freeze import GFreeze
from grow.methods.trained_model import load_model
from grow.model import loading
from grow.model.alpha import set_alpha
from grow.model.grown import add_parts, grown_mlps, grown_units, parts_with_alpha
from grow.model.in_memory import InMemoryCheckpoint, fill
from grow.model.switched import SwitchedModel, set_switch
from grow.model.wrapped import unwrapped
from grow.names import canonical, is_growth, named_beside, own_name
from grow.parts import FIELDS
from grow.plan import GrowthPlan

__all__ = ["attach", "grow_model", "load", "save_growth", "set_alpha", "set_switch", "to_stock", "trainable"]


def grow_model(
    model: PreTrainedModel, layers: str | int | Iterable[int] | None = None, factor: int = 2, **parts: Any
) -> PreTrainedModel:
    """Grows a loaded model's MLPs, or other parts, in place, and returns it: with factor 2 its outputs stay exactly the
    same.

    Works on any Hugging Face model whose MLPs are known (grow/checkpoint/README.md), in float32, bfloat16 or float16
    (in float16 and for factors above 2 the difference is in the last bits). `layers` are indices, or "all", "0-8",
    "0,3,7-9"; each of these MLPs becomes `factor` times as wide. `parts` are the further flags of `grow expand`:
    `attention` "queries" or "heads" in `attention_layers` or all, `tower` "vision" (the MLPs of the tower for images)
    in `tower_layers` or all, `train_projector`, `train_embedding`; with one of these MLPs grow only in the `layers`
    that are given. Raises UserError for a model that cannot grow, and for a part that there is not.
    """
    for name in parts:
        if name not in FIELDS:
            raise UserError(f"grow_model: {unknown(name, FIELDS, 'part')}")
    whole, model = model, unwrapped(model)
    base = InMemoryCheckpoint(model)
    named = {name: value if isinstance(value, bool) else _listed(value) for name, value in parts.items()}
    plan = make_plan(base, factor=factor, layers="" if layers is None else _listed(layers) or "none", **named)
    _add(model, plan)
    fill(model, added_tensors(base, plan))
    model.config.growth = plan.facts() | {"trained": None, "base": {"name": str(base.path), "files": {}}}
    return whole


def _listed(layers: str | int | Iterable[int] | None) -> str:
    if layers is None or isinstance(layers, (str, int)):
        return "" if layers is None else str(layers)
    return ",".join(map(str, layers))


def trainable(model: PreTrainedModel, method: str = "g_freeze") -> list[nn.Parameter]:
    """Freezes a grown model except for the parameters that a method trains, and returns these, for an optimizer.

    "g_freeze" trains the added copies; "g_train" also the original gate and up projections of the grown layers, as
    copies beside the base's own, which stay. Raises UserError for another method, or a model that has not grown.
    """
    cls = METHODS.get(method)
    if cls is None or not issubclass(cls, GFreeze) or method == "g_lora":
        raise UserError(f"trainable: {method}: there are g_freeze and g_train; other methods train by a recipe")
    model = unwrapped(model)
    _plan_of(model)
    cls().prepare(model)
    model.config.growth["trained_up"] = any(part.trained is not None for part in grown_units(model))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_growth(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes what growth has added as a growth package: the tensors, in their dtype, and growth.json.

    growth.json identifies the base by checksums of its tensors, and of its files if the model was loaded from local
    ones. Raises UserError if the model has not grown, or if the folder is there already.
    """
    model = unwrapped(model)
    plan = _plan_of(model)
    own = InMemoryCheckpoint(model)
    files = own.files()
    names = _names_in_files(own, files) if files is not None and "growth" not in files.config else {}
    added = {
        named_beside(name, names.get(own_name(name), own_name(name))): own.lazy(name)
        for name in own.tensors
        if is_growth(name)
    }
    base, base_tensors = _base_identity(own, files if names else None, names)
    facts = without_checksums(model.config.growth) | {
        "trained": model.config.growth.get("trained") or {},
        "trained_up": plan.trained_up,
        "base": base,
    }
    shards = split_into_shards(added, parse_size("max_shard_size", GROWTH_SHARD_SIZE), "growth")
    with OutputFolder(folder, {"growth in memory": uuid4().hex}) as out:
        sums = out.write_shards(shards, no_progress)
        write_growth(out, facts | {"tensors": sums, "base_tensors": base_tensors})


def attach(model: PreTrainedModel, package: str | Path) -> PreTrainedModel:
    """Puts a growth package on the loaded base that it grew from, in place, and returns it, as trained (α = 1).

    `package` is a folder, or a name on the Hugging Face hub, which is fetched if it is not in the cache. The base may
    be in another float type than the one that grew, if one is the other rounded. Raises UserError for another base:
    growth is a difference from that base's every value.
    """
    facts, added = open_package(str(package))
    whole, model = model, unwrapped(model)
    own = InMemoryCheckpoint(model)
    if any(is_growth(name) for name in own.tensors):
        raise UserError(f"{own.path}: is grown already; load its base anew")
    check_base_tensors(own, facts, own.files())
    plan = GrowthPlan.from_config({"growth": facts})
    assert plan is not None
    _add(model, plan)
    fill(model, {name: added.lazy(name) for name in added.tensors})
    set_alpha(model, 1.0)
    model.config.growth = without_checksums(facts)
    loading.put_own_switch(model)
    return whole


def load(path: str | Path, dtype: torch.dtype | str = "auto", alpha: float = 1.0, start: str = "") -> PreTrainedModel:
    """Opens a checkpoint, grown or stock, or a finished run by any method, as a model.

    `dtype` "auto" is the checkpoint's own. `alpha` is the interpolation coefficient of a model with its base inside: 0
    is the base, 1 as trained. `start` is the checkpoint that a run started from, if that has moved. Raises UserError
    for anything else.
    """
    return load_model(path, dtype, alpha, start)


def to_stock(model: PreTrainedModel, folder: str | Path, uniform: bool = False, without_switch: bool = False) -> None:
    """Writes a grown model as a stock checkpoint, which loads anywhere: one MLP a layer, `factor` times as wide.

    The model's interpolation coefficient is folded into the weights. Stock models have one width, so where only some
    layers have grown `uniform` pads the others with neurons that are zero. They have no switch either: `without_switch`
    writes a model that has one as it is when it is on. The tokenizer of the folder that the model was loaded from goes
    with it. Raises UserError where one of both is needed and not given, or if the folder is there already.
    """
    out, model = Path(folder), unwrapped(model)
    refuse_existing(out)
    plan = _plan_of(model)
    if isinstance(model, SwitchedModel) and not without_switch:
        raise UserError(f"{out}: the model has a switch, and a stock checkpoint cannot: pass without_switch=True")
    # One α is of all attentions, of a tower and its projector; the decoder's MLPs may each have their own beside it.
    mlps = list(grown_mlps(model))
    common = next((float(part.alpha) for part in parts_with_alpha(model) if part not in mlps), 1.0)
    alphas = tuple(float(mlp.alpha) / common if common else 0.0 for mlp in mlps)
    source = TrainedWeights(InMemoryCheckpoint(model))
    plan = dataclasses.replace(plan, alphas=alphas)
    tensors = stock_tensors(source, {"": plan}, uniform, common, None)
    config = type(model.config).from_dict(stock_config(source, tensors))
    with torch.device("meta"):
        stock = getattr(type(model), "stock_class", type(model))(config)
    stock.load_state_dict({name: tensor.load() for name, tensor in tensors.items()}, strict=False, assign=True)
    stock.tie_weights()
    left = [name for name, parameter in stock.named_parameters() if parameter.is_meta]
    if left:
        raise UserError(f"{out}: the model in memory has no {left[0]}, which {type(stock).__name__} needs")
    if (generation := getattr(model, "generation_config", None)) is not None:
        try:
            generation.validate(strict=True)  # as it is when it is saved
        except ValueError as error:
            raise UserError(f"{out}: the model's generation_config: {' '.join(str(error).split())}") from error
        stock.generation_config = generation
    with OutputFolder(out, {"stock from memory": uuid4().hex}) as written:
        stock.save_pretrained(written.partial)
        with contextlib.suppress(UserError):  # the folder that the model was loaded from need not be here
            for file in side_files(locate(model.name_or_path)):
                if not (written.partial / file.name).exists():
                    written.copy(file)


def _plan_of(model: PreTrainedModel) -> GrowthPlan:
    plan = GrowthPlan.from_config({"growth": getattr(model.config, "growth", None)})
    if plan is None or not any(True for _ in parts_with_alpha(model)):
        raise UserError(f"{type(model).__name__}: has not grown; call grow.grow_model(model), or load a grown one")
    return plan


def _add(model: PreTrainedModel, plan: GrowthPlan) -> None:
    """Adds the modules of a plan, where the base's own are and in their dtype."""
    add_parts(model, plan)
    for part in parts_with_alpha(model):
        own = next(part.parameters())
        for added in filter(None, (part.grown, getattr(part, "trained", None))):
            added.to(device=own.device, dtype=own.dtype).requires_grad_(False)


def _names_in_files(own: InMemoryCheckpoint, files: Checkpoint) -> dict[str, str]:
    """Maps the base's tensors in memory to their names in its files; empty if one of them is not there."""
    on_disk = {canonical(name): name for name in files.tensors}
    names = {name: on_disk.get(canonical(name), "") for name in own.tensors if not is_growth(name)}
    return names if all(names.values()) else {}


def _base_identity(
    own: InMemoryCheckpoint, files: Checkpoint | None, names: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what identifies the base in memory: "base" and "base_tensors" of growth.json."""
    base_names = [name for name in own.tensors if not is_growth(name)]
    if files is not None:
        facts, in_files = base_identity(files)
        base = {**base_facts(files), "files": facts}
        if all(matches(own.lazy(name), in_files[names[name]]) for name in base_names):
            return base, in_files
    in_memory = {names.get(name, name): checksum(own.lazy(name)) for name in base_names}
    if files is not None:
        changed = [name for name, digest in in_memory.items() if not matches(files.lazy(name), digest)]
        if not changed:  # loaded in a type that rounds what stands in the files
            return base, in_memory
        warnings.warn(
            f"the base in memory is not that of {files.path}: {changed[0]} differs. The growth is saved for the base "
            "as it is in memory",
            stacklevel=3,
        )
    return {"name": str(own.path), "files": {}}, in_memory
