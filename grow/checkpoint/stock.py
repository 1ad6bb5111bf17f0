"""The stock form of what has grown: tensors that a class of transformers loads as they are, and their config.

Gate and up of the base and of the copies are concatenated by rows, and the down-projections by columns as [D/k, D'], so
the model's intermediate_size is k·p (stock_mlp.py). Master weights are rounded once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from grow.checkpoint.lazy import LazyTensor, interpolated
from grow.checkpoint.one_skill import plans_of
from grow.checkpoint.stock_mlp import Blocks, Grown, blocks, grouped, hidden_units, stock_heads, stock_matrix, stock_mlp
from grow.checkpoint.trained_weights import TrainedWeights
from grow.errors import UserError
from grow.names import is_growth, of_skill
from grow.parts import PARTS, parts_of
from grow.parts.part import Part, is_transposed
from grow.plan import GrowthPlan, Where


def stock_tensors(
    source: TrainedWeights, plans: Mapping[str, GrowthPlan], uniform: bool, alpha: float, dtype: str | None
) -> dict[str, LazyTensor]:
    """Returns the tensors of a stock checkpoint at an interpolation coefficient, by the names that the start has.

    `plans` are those of the skills by name; a single one's is "". `dtype` is safetensors' name of a float type; None
    keeps the start's. Raises UserError where layers would differ in width and `uniform` does not pad them.
    """
    start = source.start
    joined: dict[str, LazyTensor] = {}
    for part, where in _grown(plans):
        joined |= _stock_part(source, part, where, plans, uniform, alpha, dtype)
        beside = {name: start.lazy(own) for name, own in part.stock_beside(start).items()}
        joined |= {name: own.to(dtype or own.dtype) for name, own in beside.items()}
    tensors = {}
    for name, info in start.tensors.items():
        if name not in joined and not is_growth(name):
            target = dtype if dtype and info.is_float else info.dtype
            tensors[name] = interpolated(start.lazy(name), source.tensor(name), alpha, target)
        elif name in joined:
            tensors[name] = joined.pop(name)  # in the order that the start has
    return tensors | joined | _new_tensors(source, alpha, dtype)


def _grown(plans: Mapping[str, GrowthPlan]) -> Iterator[tuple[Part, dict[str, Where]]]:
    """Yields each kind of part that has grown, with where it has for which skills."""
    grown = {name: dict(parts_of(plan)) for name, plan in plans.items()}
    for part in PARTS.values():
        where = {name: own[part] for name, own in grown.items() if part in own}
        if where:
            yield part, where


def _stock_part(
    source: TrainedWeights,
    part: Part,
    where: Mapping[str, Where],
    plans: Mapping[str, GrowthPlan],
    uniform: bool,
    alpha: float,
    dtype: str | None,
) -> dict[str, LazyTensor]:
    """Returns the stock form of a kind of part in all layers; `where` it has grown, and `plans`, by skill."""
    start, kind = source.start, next(iter(where.values())).kind
    prefixes, transposed = part.prefixes(start.tensors), is_transposed(start.config)
    made: dict[int, Blocks] = {}
    targets: dict[int, str] = {}
    for layer, prefix in prefixes.items():
        own = {end: start.lazy(f"{prefix}.{end}") for end in part.ends(start, prefix, kind)}
        targets[layer] = dtype or next(iter(own.values())).dtype
        skills = [
            _skill(source, part, plans[name], layer, f"{prefix}.", name, alpha, list(own))
            for name, grown in where.items()
            if layer in grown.layers
        ]
        made[layer] = blocks(own, skills, targets[layer])
    widths: dict[int, int] = {}
    if part.made_of != "matrix":
        units = {layer: hidden_units(parts, transposed) for layer, parts in made.items()}
        widths = part.stock_widths(start, units)
        narrow = [layer for layer, count in units.items() if count < widths[layer]]
        if narrow and not uniform:
            raise UserError(f"{part.narrower.format(narrow)}: add --uniform to pad {part.padding}")
    found: dict[str, LazyTensor] = {}
    for layer, parts in made.items():
        if part.made_of == "matrix":
            joined = stock_matrix(parts, targets[layer])
        elif part.made_of == "heads":
            groups = part.groups(start, prefixes[layer], kind)
            joined = stock_heads(grouped(parts, groups, widths[layer]), targets[layer])
        else:
            joined = stock_mlp(parts, widths[layer], targets[layer], transposed)
        found |= {f"{prefixes[layer]}.{end}": tensor for end, tensor in joined.items()}
    return found


def _skill(
    source: TrainedWeights, part: Part, plan: GrowthPlan, layer: int, prefix: str, name: str, alpha: float,
    ends: list[str],
) -> Grown:  # fmt: skip
    """Returns what a skill is in one layer's part; `ends` are those of its tensors' names."""
    copies = {end: source.tensor(of_skill(f"{prefix}grown.{end}", name)) for end in ends}
    up = {end: of_skill(f"{prefix}trained.{end}", name) for end in ends}
    trained = {end: source.tensor(key) for end, key in up.items() if source.has(key)}
    factor = 2 if part.made_of == "matrix" else plan.factor
    return Grown(factor, alpha * plan.own_alpha(part.name, layer), copies, trained)


def _new_tensors(source: TrainedWeights, alpha: float, dtype: str | None) -> dict[str, LazyTensor]:
    """Returns the tensors that a method has added and the base has no counterpart for, in the base's dtype."""
    known = source.start.tensors
    new = {name: tensor for name, tensor in source.trained.items() if name not in known and not is_growth(name)}
    if new and alpha != 1:
        raise UserError(f"--alpha {alpha:g}: the base has no {next(iter(new))} to interpolate with")
    own = next(info.dtype for info in known.values() if info.is_float)
    return {name: tensor.to(dtype or own) for name, tensor in new.items()}


def stock_config(source: TrainedWeights, tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Returns the config of a stock checkpoint with these tensors: without growth, and of their shapes."""
    start = source.start
    config = {key: value for key, value in (source.config or start.config).items() if key != "growth"}
    if "growth" not in start.config:
        return config
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for part, _ in _grown(plans_of(start.config)):
        config = part.stock_config(config, start, shapes)
    return config
