"""Tensors that are not in memory: a shape, a dtype, and a way to get some of the rows.

Tensors of a checkpoint, and those made of them (rounded, scaled, concatenated), are computed a block of rows at a time,
so that an embedding of gigabytes costs no more memory than a norm.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from grow.checkpoint.dtypes import DTYPES, TORCH_NAMES, Rows, convert, finite, itemsize, scale

BLOCK = 2**20
"""Bytes that are in memory at a time, roughly; few enough for the processor's cache."""


@dataclass(frozen=True)
class LazyTensor:
    """Reads a tensor by rows: `rows(begin, end)` returns [end − begin, *shape[1:]], not to be written to.

    `dtype` is safetensors' name of it (grow.checkpoint.dtypes). A scalar counts as one row.
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], Rows]

    @property
    def length(self) -> int:
        """Returns the number of rows."""
        return self.shape[0] if self.shape else 1

    @property
    def numel(self) -> int:
        """Returns the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Returns the size in a file, in bytes."""
        return self.numel * itemsize(self.dtype)

    def blocks(self) -> Iterator[Rows]:
        """Yields all rows, in blocks of about BLOCK bytes."""
        step = max(1, BLOCK // max(1, self.nbytes // max(1, self.length)))
        for begin in range(0, self.length if self.numel else 0, step):
            yield self.rows(begin, min(begin + step, self.length))

    def load(self) -> Any:
        """Returns the whole tensor, as a torch.Tensor."""
        import torch

        values = np.ascontiguousarray(self.rows(0, self.length)).reshape(self.shape).copy()
        return torch.from_numpy(values).view(getattr(torch, TORCH_NAMES[self.dtype]))

    def halves(self) -> tuple["LazyTensor", "LazyTensor"]:
        """Returns the upper and the lower half of the rows."""
        return self.part(0, 0, 2), self.part(0, 1, 2)

    def part(self, axis: int, index: int, count: int) -> "LazyTensor":
        """Returns one of `count` equal parts, of the rows (axis 0) or of the columns (1)."""
        size = self.shape[axis] // count
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        first = index * size
        if axis:
            return LazyTensor(shape, self.dtype, lambda begin, end: self.rows(begin, end)[:, first : first + size])
        return LazyTensor(shape, self.dtype, lambda begin, end: self.rows(first + begin, first + end))

    def map(self, function: Callable[[Rows], Rows], dtype: str | None = None) -> "LazyTensor":
        """Returns the tensor with a function applied to each block of rows; `dtype` if the function changes it."""
        return LazyTensor(self.shape, dtype or self.dtype, lambda begin, end: function(self.rows(begin, end)))

    def to(self, dtype: str) -> "LazyTensor":
        """Returns the tensor in another float type."""
        return self if dtype == self.dtype else self.map(lambda rows: convert(rows, self.dtype, dtype), dtype)

    def scaled(self, factor: float) -> "LazyTensor":
        """Returns the tensor times a number."""
        return self if factor == 1 else self.map(lambda rows: scale(rows, self.dtype, factor))


def sound(tensor: LazyTensor, rows: Rows) -> bool:
    """Says whether some rows of a tensor are finite. A scalar need not be: it may be a bound, such as those that Gemma
    4's audio tower puts to activations."""
    return tensor.numel == 1 or finite(rows, tensor.dtype)


def from_tensor(tensor: Any) -> LazyTensor:
    """Wraps a torch.Tensor that is in memory, or mapped into it."""
    import torch

    dtype = next(name for name, known in TORCH_NAMES.items() if getattr(torch, known) == tensor.dtype)
    tensor = tensor.detach().contiguous()
    values = (tensor.view(torch.uint16) if dtype == "BF16" else tensor).numpy()
    rows = values if values.ndim else values[None]
    return LazyTensor(tuple(tensor.shape), dtype, lambda begin, end: rows[begin:end])


def zeros(shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """Returns a tensor of zeros."""
    return LazyTensor(shape, dtype, lambda begin, end: np.zeros((end - begin, *shape[1:]), DTYPES[dtype]))


def concat_rows(*parts: LazyTensor) -> LazyTensor:
    """Concatenates tensors along the first dimension."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def rows(begin: int, end: int) -> Rows:
        found, start = [], 0
        for part in parts:
            first, last = max(begin - start, 0), min(end - start, part.length)
            if first < last:
                found.append(part.rows(first, last))
            start += part.length
        return found[0] if len(found) == 1 else np.concatenate(found)

    return LazyTensor(shape, parts[0].dtype, rows)


def concat_columns(*parts: LazyTensor) -> LazyTensor:
    """Concatenates tensors along the second dimension."""
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return LazyTensor(
        shape, parts[0].dtype, lambda begin, end: np.concatenate([p.rows(begin, end) for p in parts], axis=1)
    )


def elementwise(function: Callable[..., Rows], dtype: str, *parts: LazyTensor) -> LazyTensor:
    """Applies a function to several tensors of one shape, computed in a type that holds them and rounded once."""
    wide = "F64" if "F64" in (dtype, *(part.dtype for part in parts)) else "F32"
    same = [part.to(wide) for part in parts]

    def rows(begin: int, end: int) -> Rows:
        return convert(function(*(part.rows(begin, end) for part in same)), wide, dtype)

    return LazyTensor(parts[0].shape, dtype, rows)


def mean(*parts: LazyTensor) -> LazyTensor:
    """Returns the mean of tensors of one shape, in fp32."""
    return elementwise(lambda *rows: sum(rows[1:], rows[0]) / rows[0].dtype.type(len(rows)), "F32", *parts)


def interpolated(base: LazyTensor, trained: LazyTensor, alpha: float, dtype: str) -> LazyTensor:
    """Returns base + α (trained − base), rounded once to `dtype`. α = 1 is trained, 0 is base, exactly."""
    if alpha in (0, 1):
        return (trained if alpha else base).to(dtype)

    def between(own: Rows, other: Rows) -> Rows:
        with np.errstate(invalid="ignore"):  # infinite values, such as Gemma 4's towers may clip by
            return np.where(own == other, own, own + own.dtype.type(alpha) * (other - own))

    return elementwise(between, dtype, base, trained)
