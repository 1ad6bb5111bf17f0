"""Writes sharded safetensors as a stream.

The library's own writer wants every tensor in memory at once; this one is told names, dtypes and shapes first and gets
the values a block at a time. Checksums are XXH3-128 (https://xxhash.com): they detect damage by disks and networks, and
cost nothing beside reading.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path

import numpy as np
from xxhash import xxh3_128

from grow.checkpoint.dtypes import DTYPES, Rows
from grow.checkpoint.lazy import BLOCK, LazyTensor, sound
from grow.checkpoint.shards import TensorInfo, read_header
from grow.errors import UserError

MAX_SHARD_SIZE = "5GB"
GROWTH_SHARD_SIZE = "1GB"
"""Smaller, so that several workers have shards to write; the same on every machine, so that the files are the same."""
_WRITEBACK = 32 * 2**20
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


def split_into_shards(
    tensors: Mapping[str, LazyTensor], max_shard_size: int, stem: str
) -> dict[str, dict[str, LazyTensor]]:
    """Shares tensors out to files of about the same size, at most `max_shard_size` bytes (except for a larger single
    tensor).

    Keeps their order; returns {"stem-00001-of-00002.safetensors": {name: tensor}, …}. Equal shards keep all workers
    busy to the end.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    count = max(1, ceil(total / max_shard_size))
    while True:
        shards: dict[int, dict[str, LazyTensor]] = {}
        start = 0
        for name, tensor in tensors.items():
            middle = start + tensor.nbytes / 2
            shards.setdefault(int(middle * count / max(total, 1)), {})[name] = tensor
            start += tensor.nbytes
        if all(sum(t.nbytes for t in part.values()) <= max_shard_size or len(part) == 1 for part in shards.values()):
            break
        count += 1 + count // 100  # by 1 it would take for ever where neighbours are large, files small
    parts = list(shards.values()) or [{}]
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def files_of(shards: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, str]:
    """Returns the file of each tensor."""
    return {name: file for file, tensors in shards.items() for name in tensors}


def write_shard(
    path: Path, tensors: Mapping[str, LazyTensor], wrote: Callable[[int], object], ahead: bool
) -> dict[str, str]:
    """Streams tensors into one safetensors file and syncs it. Returns each tensor's checksum.

    `wrote` is called with the number of bytes just written. `ahead` takes a second thread, which computes each block
    while the one before it is being written. Raises UserError for a tensor that holds NaN or infinity, since a
    checkpoint of it would be useless.
    """
    digests = {name: xxh3_128() for name in tensors}
    head = header(tensors)
    with path.open("xb", buffering=0) as file:
        stream = Stream(file.fileno())
        stream.write(head)
        blocks = _checked(tensors, digests)
        for data in _one_ahead(blocks) if ahead else blocks:
            stream.write(data)
            wrote(len(data))
        if stream.written != len(head) + sum(tensor.nbytes for tensor in tensors.values()):
            raise ValueError(f"{path}: {stream.written - len(head)} bytes were given for {list(tensors)}")
        os.fsync(file.fileno())
    return {name: digest.hexdigest() for name, digest in digests.items()}


class Stream:
    """Writes a file from beginning to end, and flushes it to the disk meanwhile. The caller closes its
    descriptor."""

    def __init__(self, descriptor: int):
        self.descriptor, self.written, self._flushed = descriptor, 0, 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes bytes. Raises OSError if the disk does not take them."""
        write_all(self.descriptor, data)
        self.written += len(data)
        if self.written - self._flushed >= _WRITEBACK:
            # This starts writing to the disk now rather than at the sync, without waiting. It also drops the written
            # pages from the page cache, where they would displace the pages that are read.
            self._flushed += _WRITEBACK
            os.posix_fadvise(self.descriptor, 0, self._flushed, os.POSIX_FADV_DONTNEED)


def _one_ahead(blocks: Iterator[memoryview]) -> Iterator[memoryview]:
    """Yields the blocks, each computed while the one before it is being written."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def header(tensors: Mapping[str, LazyTensor | TensorInfo]) -> bytes:
    """Returns the beginning of a file that holds these tensors in this order: the header's length, and the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _checked(tensors: Mapping[str, LazyTensor], digests: Mapping[str, xxh3_128]) -> Iterator[memoryview]:
    """Yields the tensors' bytes by blocks, and updates their checksums."""
    for name, tensor in tensors.items():
        for block in tensor.blocks():
            if block.dtype != DTYPES[tensor.dtype]:
                raise ValueError(f"{name}: a block is {block.dtype}, not {tensor.dtype}")
            if not sound(tensor, block):
                raise UserError(f"{name}: holds values that are not finite (NaN or infinity); the source is broken")
            data = bytes_of(block)
            digests[name].update(data)
            yield data


def bytes_of(rows: Rows) -> memoryview:
    """Returns the rows' bytes, as in a file."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of the data: one system call may write less, as on a disk that is almost full."""
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def checksum(tensor: LazyTensor) -> str:
    """Returns XXH3-128 of a tensor's bytes, as in a file."""
    digest = xxh3_128()
    for block in tensor.blocks():
        digest.update(bytes_of(block))
    return digest.hexdigest()


def equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Says whether two tensors of one shape and dtype are the same, bit for bit."""
    begin = 0
    for block in one.blocks():
        if bytes_of(block) != bytes_of(other.rows(begin, begin + len(block))):
            return False
        begin += len(block)
    return True


def file_checksums(path: Path) -> tuple[str, dict[str, str]]:
    """Returns the checksums of a safetensors file and of each tensor in it, from one pass over the file."""
    infos = read_header(path)
    whole, tensors = xxh3_128(), {}
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
            digest = xxh3_128()
            for part in parts(info.nbytes):
                whole.update(part)
                digest.update(part)
            tensors[name] = digest.hexdigest()
    return whole.hexdigest(), tensors


def weights_checksum(shards: Iterable[Path]) -> str:
    """Returns what identifies a checkpoint's weights: XXH3-128 over the checksums of its files."""
    return xxh3_128(" ".join(file_checksums(shard)[0] for shard in shards).encode()).hexdigest()
