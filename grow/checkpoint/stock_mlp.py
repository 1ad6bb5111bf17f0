"""The stock form of a grown MLP: its blocks of hidden units side by side, in one MLP as wide as all of them.

    the base's own                G, U, c · D       c = 1 − Σ αᵢ(kᵢ−1)/kᵢ over skills without a trained up-projection,
                                                    and − 1 for each with one; left out where c = 0
    skill i, trained up           G + αᵢ (G' − G), U + αᵢ (U' − U), (1 − αᵢ(kᵢ−1)/kᵢ) · D
    skill i, the copies           Gᵢ, Uᵢ, αᵢ · Dᵢ
    zeros                         up to the width of the widest layer

Where gate and up are one matrix, all gates stand above all ups.

A biased down-projection's bias is the sum of the blocks'.

Heads of attention are blocks as well, o_proj being their down-projection. Query heads that share keys and values stand
together: of each group the base's own come first, then their copies.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from grow.checkpoint.dtypes import widest
from grow.checkpoint.lazy import LazyTensor, concat_columns, concat_rows, elementwise, interpolated, zeros
from grow.names import DOWN as MLP_DOWN
from grow.names import FUSED, OUTPUT, matrix_of

DOWN = (*MLP_DOWN, OUTPUT)
_HALVES = ("gate_proj.weight", "up_proj.weight")
Tensors = Mapping[str, LazyTensor]
"""Tensors of an MLP by the ends of their names, such as gate_proj.weight."""


@dataclass(frozen=True)
class Grown:
    """Holds what one skill is in one MLP: the factor k, α, the copies, and gate and up as trained, if they were."""

    factor: int
    alpha: float
    copies: Tensors
    trained: Tensors


Blocks = list[tuple[Tensors, float]]
"""Blocks of hidden units, each with the factor of its down-projection."""


def blocks(own: Tensors, skills: list[Grown], target: str) -> Blocks:
    """Returns the blocks of an MLP; `own` are the base's tensors. `target` is the float type of interpolated ones."""
    share, found = 1.0, list[tuple[Tensors, float]]()
    for skill in skills:
        rest = 1 - skill.alpha * (skill.factor - 1) / skill.factor
        if skill.trained:
            between = {n: interpolated(own[n], tensor, skill.alpha, target) for n, tensor in skill.trained.items()}
            found.append(({**own, **between}, rest))
        share -= 1 if skill.trained else 1 - rest
        found.append((skill.copies, skill.alpha))
    return [(own, share), *found] if share else found


def hidden_units(parts: Blocks, transposed: bool) -> int:
    """Returns how many hidden units blocks have together; `transposed` where their matrices are [in, out]."""
    axis = 0 if transposed else 1
    return sum(own.shape[axis] for tensors, _ in parts for name, own in tensors.items() if _is(name, DOWN, "weight"))


def stock_mlp(parts: Blocks, width: int, target: str, transposed: bool) -> dict[str, LazyTensor]:
    """Returns the tensors of an MLP of `width` hidden units, by the ends of their names, in the float type `target`."""
    return {
        name: _joined(name, [(tensors[name], factor) for tensors, factor in parts], width, target, transposed)
        for name in parts[0][0]
    }


def stock_matrix(parts: Blocks, target: str) -> dict[str, LazyTensor]:
    """Returns the sum of blocks that are one matrix each, by the ends of their names, in the float type `target`."""
    return {name: _summed([_scaled(tensors[name], f, target) for tensors, f in parts], target) for name in parts[0][0]}


def stock_heads(parts: Blocks, target: str) -> dict[str, LazyTensor]:
    """Returns the tensors of an attention with the heads of all blocks, by the ends of their names, in the float type
    `target`."""
    found = {}
    for name in parts[0][0]:
        own = [(tensors[name], factor) for tensors, factor in parts]
        axis = 1 if _is(name, DOWN, "weight") else 0
        found[name] = _joined(name, own, sum(tensor.shape[axis] for tensor, _ in own), target)
    return found


def grouped(parts: Blocks, groups: int, width: int) -> Blocks:
    """Returns blocks of heads cut into the groups that share keys and values, group after group; each group is
    filled with heads of zeros, which add nothing, up to its share of `width`."""
    found: Blocks = []
    for group in range(groups):
        cut: Blocks = []
        for tensors, factor in parts:
            cut.append(({name: _group(name, own, group, groups) for name, own in tensors.items()}, factor))
        room = width // groups - hidden_units(cut, False)
        if room:
            share = room / hidden_units(parts[:1], False)
            cut.append(({name: _emptied(name, own, share) for name, own in parts[0][0].items()}, 1.0))
        found += cut
    return found


def _group(name: str, tensor: LazyTensor, group: int, groups: int) -> LazyTensor:
    if _is(name, DOWN, "bias"):  # adds up over all blocks
        return tensor if group == 0 else zeros(tensor.shape, tensor.dtype)
    return tensor.part(1 if _is(name, DOWN, "weight") else 0, group, groups)


def _emptied(name: str, tensor: LazyTensor, share: float) -> LazyTensor:
    """Returns zeros like a tensor, of a share of its heads."""
    if _is(name, DOWN, "bias"):
        return zeros(tensor.shape, tensor.dtype)
    shape = list(tensor.shape)
    axis = 1 if _is(name, DOWN, "weight") else 0
    shape[axis] = round(shape[axis] * share)
    return zeros(tuple(shape), tensor.dtype)


def _joined(
    name: str, parts: list[tuple[LazyTensor, float]], width: int, target: str, transposed: bool = False
) -> LazyTensor:
    if name.startswith(FUSED):
        halves = [tensor.halves() for tensor, _ in parts]
        return concat_rows(
            *(_joined(_HALVES[half], [(pair[half], 1.0) for pair in halves], width, target) for half in (0, 1))
        )
    if not name.startswith(DOWN):
        own = [tensor.to(target) for tensor, _ in parts]
        return _side_by_side(own, width, axis=1 if transposed and name.endswith(".weight") else 0)
    scaled = [_scaled(tensor, factor, target) for tensor, factor in parts]
    if _is(name, DOWN, "bias"):
        return _summed(scaled, target)
    return _side_by_side(scaled, width, axis=0 if transposed else 1)


def _summed(parts: list[LazyTensor], target: str) -> LazyTensor:
    return parts[0] if len(parts) == 1 else elementwise(lambda *rows: sum(rows[1:], rows[0]), target, *parts)


def _side_by_side(parts: list[LazyTensor], width: int, axis: int) -> LazyTensor:
    """Concatenates blocks of hidden units along the axis that these lie on, and zeros up to a width."""
    room = width - sum(part.shape[axis] for part in parts)
    shape = list(parts[0].shape)
    shape[axis] = room
    concat = concat_columns if axis else concat_rows
    return concat(*parts, *([zeros(tuple(shape), parts[0].dtype)] if room else []))


def _is(name: str, matrices: Iterable[str], part: str) -> bool:
    """Says whether an end of a name, such as down_proj.bias, is of that part of one of the matrices."""
    return matrix_of(name) in matrices and name.endswith(f".{part}")


def _scaled(tensor: LazyTensor, factor: float, target: str) -> LazyTensor:
    """Scales a tensor in the wider of the two types, so that it is rounded once."""
    return tensor.to(widest(tensor.dtype, target)).scaled(factor).to(target)
