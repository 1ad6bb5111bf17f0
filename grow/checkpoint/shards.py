"""Sharded safetensors, streamed: a lazy reader and a writer that holds one tensor at a time.

A safetensors file is a little-endian u64 with the header's length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). The library's own writer wants every tensor in memory at once;
this one is told names, dtypes and shapes first and gets the values one by one.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` are in bytes from the start of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file. Raises UserError if the file is not sound."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short (fetch it again)")
            header = json.loads(file.read(length))
        return _check_header(path, header, 8 + length, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its safetensors header is broken (fetch the file again)") from error


def _check_header(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    tensors, end_of_last = {}, 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}, which is not supported (quantized weights?)")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if begin != end_of_last or end - begin != prod(shape) * dtype.itemsize or any(n < 0 for n in shape):
            raise UserError(f"{path}: the place of {name} in the file is wrong (fetch the file again)")
        end_of_last = end
        tensors[name] = TensorInfo(path, dtype, shape, data_start + begin, end - begin)
    if data_start + end_of_last != size:
        raise UserError(f"{path}: {size} bytes, its header speaks of {data_start + end_of_last} (fetch it again)")
    return tensors


class Checkpoint:
    """A Hugging Face checkpoint folder: its config, and its tensors, read only when asked for.

    Raises UserError if the folder, its config, its index or a shard is missing or unsound.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such folder")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self.shards = [self.path / name for name in _shard_names(self.path)]
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, info in read_header(shard).items():
                if name in self.tensors:
                    raise UserError(f"{shard}: {name} is also in {self.tensors[name].file.name}")
                self.tensors[name] = info
        self._check_index()
        self._maps: dict[Path, mmap.mmap] = {}

    def _check_index(self) -> None:
        if not (self.path / INDEX_NAME).exists():
            return
        for name, file in read_json(self.path / INDEX_NAME)["weight_map"].items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise UserError(f"{self.path}: {name} is not in {file}, where the index says it is (fetch it again)")

    def identity(self) -> list[Any]:
        """What tells these files from others without reading them: path, bytes and time of change of each shard."""
        return [[str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns] for s in self.shards]

    def read(self, name: str) -> Tensor:
        """The tensor, its memory mapped from the file: pages are read as they are used and never written."""
        info = self.tensors[name]
        if info.file not in self._maps:
            self._maps[info.file] = _map(info.file)
        return _view(self._maps[info.file], info)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _view(mapped: mmap.mmap, info: TensorInfo) -> Tensor:
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    count = info.nbytes // info.dtype.itemsize
    return torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.offset).view(info.shape)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a checkpoint?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _shard_names(path: Path) -> list[str]:
    if (path / INDEX_NAME).exists():
        weight_map = read_json(path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{path / INDEX_NAME}: it has no weight_map of names to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"{path / INDEX_NAME}: {name!r} is not a plain file name")
        return names
    if (path / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    raise UserError(f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} in it; is it a checkpoint in safetensors?")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. `pieces` yields its values, of `dtype`, in row-major order and parts of any size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def split_into_shards(specs: Iterable[TensorSpec], max_shard_size: int, stem: str) -> dict[str, list[TensorSpec]]:
    """Shares tensors out to files of at most `max_shard_size` bytes, in their order: {"stem-00001-of-00002…": […]}."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shard(path: Path, specs: list[TensorSpec], wrote: Callable[[int], object]) -> dict[str, str]:
    """Streams tensors into one safetensors file and syncs it. Returns each tensor's SHA-256.

    `wrote` is called with the number of bytes just written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            digest, written = hashlib.sha256(), 0
            for block in _bytes_of(spec):
                file.write(block)
                digest.update(block)
                written += len(block)
                wrote(len(block))
            if written != spec.nbytes:
                raise ValueError(f"{spec.name}: {written} bytes were given for {spec.nbytes}")
            checksums[spec.name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return checksums


def _bytes_of(spec: TensorSpec) -> Iterator[memoryview]:
    for piece in spec.pieces():
        if piece.dtype != spec.dtype:
            raise ValueError(f"{spec.name}: a piece is {piece.dtype}, not {spec.dtype}")
        yield piece.contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as in the file."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def shard_checksums(path: Path) -> dict[str, str] | None:
    """SHA-256 of each tensor of a shard; None if the file is not a sound one."""
    try:
        header = read_header(path)
    except UserError:
        return None
    mapped = _map(path)
    return {name: checksum(_view(mapped, info)) for name, info in header.items()}


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
