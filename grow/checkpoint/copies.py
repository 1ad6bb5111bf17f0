"""The copies that growth adds, as they are before training."""

import hashlib

import numpy as np

from grow.checkpoint.dtypes import Rows, convert
from grow.checkpoint.lazy import LazyTensor, concat_columns, concat_rows
from grow.checkpoint.shards import Checkpoint
from grow.errors import UserError
from grow.names import FUSED, canonical, is_down, is_growth
from grow.parts import MLPS, parts_of
from grow.parts.part import is_transposed
from grow.plan import GrowthPlan

# Several added copies start this far apart, in standard deviations of a row of the down-projection.
PERTURBATION = 0.01


def added_tensors(base: Checkpoint, plan: GrowthPlan, copies: Checkpoint | None = None) -> dict[str, LazyTensor]:
    """Returns the copies that growth adds, named `<mlp>.grown.{gate,up,down}_proj.weight` (or as the base's layout has
    it; in gate_up_proj copies of gate stand above those of up), in the base's dtype.

    gate and up: [(k−1)·p, h], copies concatenated by rows. down: [h, (k−1)·p], copies concatenated by columns, each
    divided by k; in a GPT-2 all of them transposed. Heads of attention likewise, o_proj as down. Biases, where the base
    has them: [(k−1)·p] copied; the down-projection's [h] once, times (k−1)/k. Of one linear map W, whatever k is, W/2.
    With `copies` they are of that checkpoint's MLPs in place of the base's. Raises UserError for a plan that does not
    fit the base.
    """
    others = {canonical(name): name for name in copies.tensors} if copies else {}
    transposed = is_transposed(base.config)
    added = {}
    for part, where in parts_of(plan):
        prefixes = part.prefixes(base.tensors)
        missing = sorted(set(where.layers) - set(prefixes))
        if missing:
            whose = f" of layers {missing}" * part.has_layers
            there = f"; it has {sorted(prefixes)}" * part.has_layers
            raise UserError(f"{base.path}: has no {part.name}{whose} to grow{there}")
        for layer in where.layers:
            ends = part.ends(base, prefixes[layer], where.kind)
            names = {end: f"{prefixes[layer]}.{end}" for end in ends}
            own = {end: base.lazy(name) for end, name in names.items()}
            if copies is not None:
                own = {end: copies.lazy(others[canonical(names[end])]).to(own[end].dtype) for end in ends}
            for end, tensor in own.items():
                whole = part.made_of == "matrix"
                made = tensor.scaled(0.5) if whole else _copied(tensor, plan.factor, names[end], transposed)
                added[f"{prefixes[layer]}.grown.{end}"] = made
    return added


def expected_growth(grown: Checkpoint, plan: GrowthPlan) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Returns the growth that a plan asks for, as it was before training, computed from the base inside; and problems
    by name: a line for each tensor that is missing, superfluous, or of another shape or dtype."""
    MLPS.checked_prefixes(grown)  # a sound base, whatever grows
    expected = added_tensors(grown, plan)
    if plan.trained_up:
        expected |= {
            name.replace(".grown.", ".trained."): grown.lazy(name.replace(".grown.", "."))
            for name in list(expected)
            if not is_down(name)
        }
    extra = (name for name in grown.tensors if is_growth(name) and name not in expected)
    problems = {name: f"{name}: is not in the plan" for name in extra}
    for name, tensor in expected.items():
        info = grown.tensors.get(name)
        if info is None:
            problems[name] = f"{name}: is in the plan but not in the checkpoint"
        elif (info.shape, info.dtype) != (tensor.shape, tensor.dtype):
            wanted = f"{list(tensor.shape)} {tensor.dtype}"
            problems[name] = f"{name}: is {list(info.shape)} {info.dtype}, the plan says {wanted}"
    return expected, problems


def _copied(own: LazyTensor, k: int, name: str, transposed: bool) -> LazyTensor:
    """Returns the copies of a tensor of hidden units, or of heads, whose name is `name`."""
    if f".{FUSED}." in name:
        gate, up = own.halves()
        return concat_rows(*[gate] * (k - 1), *[up] * (k - 1))
    bias = name.endswith(".bias")
    if not is_down(name):
        return (concat_columns if transposed and not bias else concat_rows)(*[own] * (k - 1))
    return own.scaled((k - 1) / k) if bias else _divided(own, k, name, transposed)


def _divided(down: LazyTensor, k: int, name: str, transposed: bool) -> LazyTensor:
    """Maps [h, p] to [h, (k−1)·p], each copy divided by k; or, transposed, [p, h] to [(k−1)·p, h].

    Several equal copies would get equal gradients and stay equal for ever. So they start apart by noise that sums to
    zero: the last copy is (k−1)/k·D minus the other copies, so that the sum is off by one rounding only.
    """
    if k == 2:
        return down.scaled(0.5)
    length, columns = down.shape

    def copies_of(index: int, values: Rows) -> Rows:
        seed = int.from_bytes(hashlib.sha256(f"{name} {index}".encode()).digest()[:8], "big")
        noise = np.random.default_rng(seed).standard_normal((k - 1, columns), dtype=np.float32)
        noise = (noise - noise.mean(axis=0)) * (PERTURBATION * values.std())
        copies = convert(values / np.float32(k) + noise, "F32", down.dtype)
        others = convert(copies[:-1], down.dtype, "F32").sum(axis=0)
        copies[-1] = convert(values * np.float32((k - 1) / k) - others, "F32", down.dtype)
        return copies

    def own_rows(begin: int, end: int) -> Rows:
        return convert(down.rows(begin, end), down.dtype, "F32")

    def side_by_side(begin: int, end: int) -> Rows:
        return np.stack([copies_of(begin + i, own).reshape(-1) for i, own in enumerate(own_rows(begin, end))])

    def below_each_other(begin: int, end: int) -> Rows:
        places = (divmod(row, length) for row in range(begin, end))
        return np.stack([copies_of(row, own_rows(row, row + 1)[0])[copy] for copy, row in places])

    if transposed:
        return LazyTensor(((k - 1) * length, columns), down.dtype, below_each_other)
    return LazyTensor((length, (k - 1) * columns), down.dtype, side_by_side)
