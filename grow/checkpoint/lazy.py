"""Tensors that are not in memory: a shape, a dtype, and a way to get some rows of it.

Whatever a checkpoint holds and whatever is made of it (rounded, scaled, concatenated) is computed a block of rows at
a time, so that an embedding of gigabytes costs no more memory than a norm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 * 2**20
"""Bytes that are in memory at a time, roughly."""


@dataclass(frozen=True)
class Lazy:
    """A tensor by rows: `rows(begin, end)` returns [end − begin, *shape[1:]] in `dtype`, which the caller may change.

    A scalar counts as one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def length(self) -> int:
        """How many rows."""
        return self.shape[0] if self.shape else 1

    @property
    def numel(self) -> int:
        """How many elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return self.numel * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """All rows, in blocks of about BLOCK bytes."""
        step = max(1, BLOCK // max(1, self.nbytes // max(1, self.length)))
        for begin in range(0, self.length if self.numel else 0, step):
            yield self.rows(begin, min(begin + step, self.length))

    def load(self) -> Tensor:
        """The whole tensor."""
        return self.rows(0, self.length).reshape(self.shape)

    def map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "Lazy":
        """Applied to each row; `dtype` if the function changes it."""
        return Lazy(self.shape, dtype or self.dtype, lambda begin, end: function(self.rows(begin, end)))

    def to(self, dtype: torch.dtype) -> "Lazy":
        """In another dtype."""
        return self if dtype == self.dtype else self.map(lambda rows: rows.to(dtype), dtype)

    def scaled(self, factor: float) -> "Lazy":
        """Times a number."""
        return self if factor == 1 else self.map(lambda rows: rows.mul_(factor))


def of(tensor: Tensor) -> Lazy:
    """A tensor that is in memory, or mapped into it."""
    rows = tensor if tensor.dim() else tensor[None]
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda begin, end: rows[begin:end].clone())


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Lazy:
    """Zeros."""
    return Lazy(shape, dtype, lambda begin, end: torch.zeros((end - begin, *shape[1:]), dtype=dtype))


def below(*parts: Lazy) -> Lazy:
    """Concatenated along the first dimension."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def rows(begin: int, end: int) -> Tensor:
        found, start = [], 0
        for part in parts:
            first, last = max(begin - start, 0), min(end - start, part.length)
            if first < last:
                found.append(part.rows(first, last))
            start += part.length
        return found[0] if len(found) == 1 else torch.cat(found)

    return Lazy(shape, parts[0].dtype, rows)


def beside(*parts: Lazy) -> Lazy:
    """Concatenated along the second dimension."""
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return Lazy(shape, parts[0].dtype, lambda begin, end: torch.cat([p.rows(begin, end) for p in parts], dim=1))


def combined(function: Callable[..., Tensor], dtype: torch.dtype, *parts: Lazy) -> Lazy:
    """A function of several tensors of one shape, row by row."""
    rows: Any = lambda begin, end: function(*(part.rows(begin, end) for part in parts))  # noqa: E731
    return Lazy(parts[0].shape, dtype, rows)


def interpolated(base: Lazy, trained: Lazy, alpha: float, dtype: torch.dtype) -> Lazy:
    """base + α (trained − base), computed in fp32 and rounded once to `dtype`. α = 1 is trained, 0 is base, exactly."""
    if alpha in (0, 1):
        return (trained if alpha else base).to(dtype)
    return combined(lambda b, t: torch.lerp(b.float(), t.float(), alpha).to(dtype), dtype, base, trained)
