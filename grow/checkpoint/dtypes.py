"""The types of tensors in files, by safetensors' names, and arithmetic on them with numpy alone.

numpy has no bfloat16: its values are handled as their bits, uint16. torch would do all this too, but takes longer to
import than most checkpoints of a billion parameters take to grow.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
TORCH_NAMES = {name: np.dtype(kind).name for name, kind in DTYPES.items()} | {"BF16": "bfloat16"}
# For each float type: the integers of its width, signed and unsigned, and the bits of infinity.
_BITS: dict[str, tuple[Any, Any, int]] = {
    "F64": (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.int32, np.uint32, 0x7F80_0000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
}


def itemsize(dtype: str) -> int:
    """Returns the bytes of one value."""
    return int(np.dtype(DTYPES[dtype]).itemsize)


def is_float(dtype: str) -> bool:
    """Says whether a type is a floating-point type."""
    return dtype in _BITS


def widest(one: str, other: str) -> str:
    """Returns the float type that holds all values of both."""
    if one == other:
        return one
    return "F64" if "F64" in (one, other) else "F32"


def convert(values: Rows, dtype: str, target: str) -> Rows:
    """Converts values from one float type to another, rounded to the nearest, ties to even."""
    if dtype == target:
        return values
    if dtype == "BF16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if target == "BF16":
        return _to_bfloat16(values.astype(np.float32, copy=False))
    return values.astype(DTYPES[target], copy=False)


def _to_bfloat16(values: Rows) -> Rows:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if np.isnan(values).any():  # rounding may carry a NaN's bits into those of a number
        rounded = np.where(np.isnan(values), np.uint32(0x7FC0), rounded)
    return rounded.astype(np.uint16)


def scale(values: Rows, dtype: str, factor: float) -> Rows:
    """Multiplies values by a number, rounding once."""
    if dtype == "BF16":
        return _halved(values) if factor == 0.5 else _scaled(values, factor)
    return values * DTYPES[dtype](factor) if dtype != "F16" else (values * np.float32(factor)).astype(np.float16)


def _scaled(bits: Rows, factor: float) -> Rows:
    return _to_bfloat16(convert(bits, "BF16", "F32") * np.float32(factor))


def _halved(bits: Rows) -> Rows:
    """Multiplies bfloat16 by ½: one less in the exponent, except for zeros, subnormals and values that are not
    finite."""
    halved = bits - np.uint16(0x0080)
    # The least positive value is the smallest unsigned integer, the negative value nearest to 0 the smallest signed.
    small = bits.min(initial=0x7FFF) < 0x0100 or bits.view(np.int16).min(initial=0) < 0x0100 - 0x8000
    if small or not finite(bits, "BF16"):
        special = np.nonzero((bits & np.uint16(0x7FFF)) - np.uint16(0x0100) >= np.uint16(0x7E80))
        halved[special] = _scaled(bits[special], 0.5)
    return halved


def finite(values: Rows, dtype: str) -> bool:
    """Says whether all values are finite, which integers always are.

    Values that are not finite have bits from infinity's up: among the positive ones such a value is the largest as a
    signed integer, among the negative ones the largest as an unsigned one. Two maxima cost a tenth of testing each
    value.
    """
    if dtype not in _BITS or not values.size:
        return True
    signed, unsigned, infinity = _BITS[dtype]
    sign = 1 << (8 * values.itemsize - 1)
    return bool(values.view(signed).max() < infinity and values.view(unsigned).max() < sign + infinity)
