"""Writes sharded safetensors as a stream.

The library's own writer wants every tensor in memory at once; this one is told names, dtypes and shapes first and
gets the values a block at a time.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from grow.checkpoint.lazy import BLOCK, Lazy
from grow.checkpoint.shards import DTYPES, TensorInfo, read_header
from grow.errors import UserError

MAX_SHARD_SIZE = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(flag: str, text: str) -> int:
    """Reads a size such as 5GB or 500MB, in bytes. Raises UserError for anything else."""
    number, unit = text.upper().rstrip("KMGTB "), text.upper().lstrip("0123456789. ").strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{flag} {text}: a size is needed, such as 5GB or 500MB")
    return size


def split_into_shards(tensors: Mapping[str, Lazy], max_shard_size: int, stem: str) -> dict[str, dict[str, Lazy]]:
    """Shares tensors out to files of about the same size, at most `max_shard_size` bytes (but for one larger tensor).

    Keeps their order; returns {"stem-00001-of-00002.safetensors": {name: tensor}, …}. Equal shards keep all workers
    busy to the end.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    count = max(1, ceil(total / max_shard_size))
    while True:
        shards: dict[int, dict[str, Lazy]] = {}
        start = 0
        for name, tensor in tensors.items():
            middle = start + tensor.nbytes / 2
            shards.setdefault(int(middle * count / max(total, 1)), {})[name] = tensor
            start += tensor.nbytes
        if all(sum(t.nbytes for t in part.values()) <= max_shard_size or len(part) == 1 for part in shards.values()):
            break
        count += 1 + count // 100  # not one by one: where neighbours are large and files small, that takes for ever
    parts = list(shards.values()) or [{}]
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_shard(path: Path, tensors: Mapping[str, Lazy], wrote: Callable[[int], object]) -> dict[str, str]:
    """Streams tensors into one safetensors file and syncs it. Returns each tensor's SHA-256.

    `wrote` is called with the number of bytes just written. Raises UserError for a tensor that holds NaN or infinity:
    whatever is broken, a checkpoint of it would not be better.
    """
    checksums = {}
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), header(tensors))
        for name, tensor in tensors.items():
            digest, written = hashlib.sha256(), 0
            for block in tensor.blocks():
                _check(name, block, tensor)
                data = block.contiguous().view(-1).view(torch.uint8).numpy().data
                digest.update(data)
                write_all(file.fileno(), data)
                written += len(data)
                wrote(len(data))
            if written != tensor.nbytes:
                raise ValueError(f"{name}: {written} bytes were given for {tensor.nbytes}")
            checksums[name] = digest.hexdigest()
        os.fsync(file.fileno())
    return checksums


def header(tensors: Mapping[str, Lazy | TensorInfo]) -> bytes:
    """How a file begins that holds these tensors in this order: the header's length, and the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _check(name: str, block: Tensor, tensor: Lazy) -> None:
    if block.dtype != tensor.dtype:
        raise ValueError(f"{name}: a block is {block.dtype}, not {tensor.dtype}")
    if not finite(block):
        raise UserError(f"{name}: holds values that are not finite (NaN or infinity); the source is broken")


def finite(block: Tensor) -> bool:
    """Whether all values are finite. The sum, which is fast, tells; only if it overflows is every value looked at."""
    if not block.dtype.is_floating_point or block.sum(dtype=torch.promote_types(block.dtype, torch.float32)).isfinite():
        return True
    return bool(block.isfinite().all())


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes to the last byte: one call to the system may write less, on a disk that is almost full for one."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def checksum(tensor: Lazy) -> str:
    """SHA-256 of a tensor's bytes, as in a file."""
    digest = hashlib.sha256()
    for block in tensor.blocks():
        digest.update(block.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_checksums(path: Path) -> tuple[str, dict[str, str]]:
    """SHA-256 of a safetensors file, and of each tensor in it, in one pass over the file."""
    infos = read_header(path)
    whole, tensors = hashlib.sha256(), {}
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(BLOCK)

        def parts(count: int) -> Iterator[memoryview]:
            while count:
                size = file.readinto(memoryview(buffer)[: min(count, BLOCK)])
                if not size:
                    raise UserError(f"{path}: became shorter while it was read; fetch it again")
                count -= size
                yield memoryview(buffer)[:size]

        for part in parts(min((info.offset for info in infos.values()), default=path.stat().st_size)):
            whole.update(part)
        for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
            digest = hashlib.sha256()
            for part in parts(info.nbytes):
                whole.update(part)
                digest.update(part)
            tensors[name] = digest.hexdigest()
    return whole.hexdigest(), tensors
