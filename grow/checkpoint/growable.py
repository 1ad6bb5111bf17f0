"""What of a base grows: the plan for it, or a line that says why it cannot."""

from typing import Any

from grow.checkpoint.shards import Checkpoint
from grow.checkpoint.starting import check_not_quantized
from grow.errors import UserError
from grow.names import canonical, is_growth
from grow.parts import FIELDS, MLPS, PARTS, grow_beside
from grow.parts.part import TENSORS
from grow.plan import GrowthPlan, parse_factor, text_config

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
"""What configs call the activation of their MLPs."""
_SAME = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}
"""Other names of the same activations."""


def make_plan(base: Checkpoint, **growth: Any) -> GrowthPlan:
    """Returns the plan for a base; `growth` is as plan_of takes it. Raises UserError if the base cannot be grown."""
    if "growth" in base.config or any(is_growth(name) for name in base.tensors):
        raise UserError(f"{base.path}: is grown already; give the base it grew from")
    check_not_quantized(base)
    plan = plan_of(base, **growth)
    for shard in base.shards:
        if shard.name.startswith("growth-"):
            raise UserError(f"{shard}: a grown checkpoint needs that name for another file; rename the shard")
    return plan


def plan_of(base: Checkpoint, factor: int | str = 2, layers: str = "", **fields: Any) -> GrowthPlan:
    """Returns the plan for a base, or for one that is inside a grown checkpoint, as make_plan does.

    `factor` is k; `layers` are those whose MLPs grow, as parse_layers reads them: all of them if it is empty, or none
    if something else is asked to grow by the `fields` of grow.parts.
    """
    strange = [name for name in fields if name not in FIELDS]
    if strange:
        raise TypeError(f"{strange[0]} is no field of grow.parts")
    k = parse_factor(factor)
    fields["layers"] = str(layers).strip() or ("none" if grow_beside(fields) else "all")
    chosen = {name: part.planned(base, fields, k) for name, part in PARTS.items()}
    grown = {name: where for name, where in chosen.items() if where is not None}
    if not grown:
        raise UserError(f"--layers {layers}: nothing grows; name layers, or what else grows")
    mlps = grown.pop(MLPS.name, None)
    return GrowthPlan(k, mlps.layers if mlps else (), beside=grown)


def check_copies(base: Checkpoint, copies: Checkpoint, plan: GrowthPlan) -> None:
    """Raises UserError if a checkpoint's MLPs cannot stand in for the base's."""
    if plan.beside:
        raise UserError("--copies-from: copies MLPs of the language model alone; let nothing else grow")
    if "growth" in copies.config:
        raise UserError(f"--copies-from {copies.path}: is grown; give a stock checkpoint")
    check_not_quantized(copies)
    there, prefixes = {canonical(name): info for name, info in copies.tensors.items()}, MLPS.prefixes(base.tensors)
    for layer in plan.layers:
        # Also a bias that the base has not.
        for matrix in dict.fromkeys(end.partition(".")[0] for end in MLPS.ends(base, prefixes[layer])):
            for name in (f"{prefixes[layer]}.{matrix}.{tensor}" for tensor in TENSORS):
                own, found = base.tensors.get(name), there.get(canonical(name))
                if (own and own.shape) != (found and found.shape):
                    said, wanted = (f"is {list(one.shape)}" if one else "is missing" for one in (found, own))
                    raise UserError(
                        f"--copies-from {copies.path}: {name} {said}, the base's {wanted}; the copies need an MLP of "
                        "the same shape, such as that of another training of the base"
                    )
    ours, theirs = (
        next((_SAME.get(known[key], known[key]) for key in _ACTIVATIONS if known.get(key)), "")
        for known in (text_config(base.config), text_config(copies.config))
    )
    if ours and theirs and ours != theirs:
        raise UserError(f"--copies-from {copies.path}: the activation of its MLPs is {theirs}, the base's is {ours}")
