"""Sharded safetensors, read lazily and without trust: a checkpoint is what someone downloaded.

A safetensors file is a little-endian u64 with the header's length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). Rows are read with pread rather than mapped: a file that shrinks
or a server that goes away is then an error with a name, not a signal that kills the process.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np

from grow.checkpoint.dtypes import DTYPES, Rows, is_float, itemsize
from grow.checkpoint.hub import locate
from grow.checkpoint.lazy import LazyTensor
from grow.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS, _MAX_ELEMENTS = 64, 2**40
_MAX_DEPTH = 100


@dataclass(frozen=True)
class TensorInfo:
    """Says where a tensor is stored: `offset` and `nbytes` are in bytes from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Says whether its type is a floating-point type."""
        return is_float(self.dtype)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file. Raises UserError if the file is not sound."""
    try:
        refuse_devices(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise UserError(f"{path}: not a safetensors file, or cut short (fetch it again)")
            header = json.loads(file.read(length), object_pairs_hook=no_name_twice)
        return _check_header(path, header, 8 + length, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its safetensors header is broken (fetch the file again)") from error


def has_index(path: Path) -> bool:
    """Says whether a checkpoint consists of the files that its index lists. Beside a model.safetensors, which
    transformers then takes, an index and its shards are left over from an earlier save."""
    return (path / INDEX_NAME).exists() and not (path / SINGLE_NAME).exists()


def refuse_adapter(path: Path) -> None:
    """Raises UserError for a folder with PEFT's adapter: transformers would put it on the model, or on the base that it
    names, even if it is merged already."""
    if not (path / "adapter_config.json").exists():
        return
    if not (path / "config.json").exists():
        raise UserError(f"{path}: an adapter (PEFT), not a model; merge it into its base first")
    raise UserError(f"{path}: an adapter (PEFT) lies beside the model; move adapter_config.json away if it is merged")


def refuse_devices(path: Path) -> None:
    """Raises UserError for a pipe or a device, on which reading would never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file")


def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object. Raises ValueError where a key stands in it twice: which value is meant cannot be known."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)} stands in an object twice")
    return found


def _check_header(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    tensors, end_of_last = {}, 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        name.encode()  # a name with half of a surrogate pair could not be written again
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}, which is not supported (quantized weights?)")
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = len(shape) <= _MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
        # The other dimensions are checked even if one is zero: torch multiplies them.
        if not sound or prod(n or 1 for n in shape) > _MAX_ELEMENTS:
            raise UserError(f"{path}: {name} has an invalid shape (fetch the file again)")
        if begin != end_of_last or end - begin != prod(shape) * itemsize(dtype):
            raise UserError(f"{path}: the place of {name} in the file is wrong (fetch the file again)")
        end_of_last = int(end)
        tensors[name] = TensorInfo(path, dtype, shape, data_start + int(begin), int(end - begin))
    if data_start + end_of_last != size:
        raise UserError(f"{path}: {size} bytes, its header speaks of {data_start + end_of_last} (fetch it again)")
    return tensors


class Checkpoint:
    """Opens a Hugging Face checkpoint: its config, and its tensors, which are read only when asked for.

    `name` is a folder, or a hub name that is in the local cache. Raises UserError if the folder, its config, its index
    or a shard is missing or unsound.
    """

    def __init__(self, name: str | os.PathLike[str]):
        self.path = locate(name)
        refuse_adapter(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        weight_map = _weight_map(self.path)
        self._read([self.path / file for file in sorted(set(weight_map.values())) or [SINGLE_NAME]])
        for key, file in weight_map.items():
            if key not in self.tensors or self.tensors[key].file.name != file:
                raise UserError(f"{self.path}: {key} is not in {file}, where the index says it is (fetch it again)")

    @classmethod
    def of_files(cls, path: Path, shards: list[Path]) -> Self:
        """Opens some safetensors files by themselves, without a config. Raises UserError if one is not sound."""
        files = cls.__new__(cls)
        files.path, files.config = path, {}
        files._read(shards)
        return files

    def _read(self, shards: list[Path]) -> None:
        self.shards = shards
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for key, info in read_header(shard).items():
                if key in self.tensors:
                    raise UserError(f"{shard}: {key} is also in {self.tensors[key].file.name}")
                self.tensors[key] = info
        self._files: dict[Path, int] = {}

    def identity(self) -> list[Any]:
        """Returns what tells the shards from others."""
        return identity(self.shards)

    def lazy(self, key: str) -> LazyTensor:
        """Returns the tensor, to be read by rows."""
        info = self.tensors[key]
        return LazyTensor(info.shape, info.dtype, partial(self._rows, info))

    def read(self, key: str) -> Any:
        """Returns the whole tensor, as a torch.Tensor."""
        return self.lazy(key).load()

    def _rows(self, info: TensorInfo, begin: int, end: int) -> Rows:
        rows = np.empty((end - begin, *info.shape[1:]), DTYPES[info.dtype])
        if rows.nbytes:
            place = info.offset + begin * (rows.nbytes // (end - begin))
            read_exactly(self._descriptor(info.file), rows.reshape(-1).view(np.uint8).data, place, info.file)
        return rows

    def _descriptor(self, file: Path) -> int:
        # Opened once and kept for the life of the process: a file that is removed meanwhile can still be read.
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def identity(files: Iterable[Path]) -> list[Any]:
    """Returns what tells files from others without reading them: path, bytes and time of change of each."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def read_exactly(descriptor: int, into: memoryview, place: int, file: Path) -> None:
    """Fills a buffer from the offset `place`. Raises UserError if the file has become too short."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], place + done)
        if count == 0:
            raise UserError(f"{file}: became shorter while it was read; fetch it again, then run the command again")
        done += count


def read_json(path: Path, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if it is missing or not one."""
    try:
        refuse_devices(path)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a checkpoint?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    if _deeper(value, _MAX_DEPTH):
        raise UserError(f"{path}: nested too deeply")
    return value


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        parents = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in parents for child in (item.values() if isinstance(item, dict) else item)]
    return bool(level)


def plain_name(name: Any, where: Path) -> str:
    """Returns the name that downloaded metadata gives for a file beside it. Raises UserError for one that leads
    elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise UserError(f"{where}: {name!r} is not a plain file name")
    return name


def _weight_map(path: Path) -> dict[str, str]:
    """Returns the file of each tensor, as the index says; {} for a checkpoint in one file."""
    index = path / INDEX_NAME
    if not has_index(path):
        if not (path / SINGLE_NAME).exists():
            raise UserError(f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} in it; is it a checkpoint in safetensors?")
        return {}
    weight_map = read_json(index, no_name_twice).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: it has no weight_map of names to files")
    for name in weight_map.values():
        # Under another name it could take the place of a file that is written beside it.
        if not plain_name(name, index).endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not the name of a safetensors file")
    return weight_map
