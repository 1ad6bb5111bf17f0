"""The rows of a data set, read when they are asked for, whatever files they are in.

What stands in a file is what a template gets (grow.data.text_files, grow.data.table_files), and rows need not have the
same columns or types.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from xxhash import xxh3_128

from grow.checkpoint.hub import Repository
from grow.data.files import data_format, files_below, split_files
from grow.errors import UserError, innermost

_DATA_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BLOCK = 2**24
_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
    ".lz4": partial(pyarrow.input_stream, compression="lz4"),
}  # fmt: skip


class BrokenRow(dict[str, Any]):
    """A row that cannot be read, and why."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason


class Rows(Sequence[dict[str, Any]]):
    """Rows, read when asked for. A row that cannot be read is a BrokenRow, so that the others can be used."""

    name = ""

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rows of this range, which lies within their number."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def checksum(self) -> str:
        """XXH3-128 of what they hold."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """A row's place, for messages."""
        return f"row {index}"

    def number(self, index: int) -> int:
        """A row's index in the whole split."""
        return index

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            return self.read(first, max(first, last))[::step]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        return self.read(place, place + 1)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self), 1000):
            yield from self.read(first, min(first + 1000, len(self)))

    def select(self, indices: Sequence[int]) -> "Rows":
        """Some of them, in this order."""
        return Selection(self, indices)

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """The names of their columns; of the first rows alone, where these have all that are wanted."""
        found: dict[str, None] = {}
        for index, row in enumerate(self):
            found.update(dict.fromkeys(row))
            if index >= 999 and all(name in found for name in wanted):
                break
        return list(found)


class Selection(Rows):
    """Some rows of others."""

    def __init__(self, rows: Rows, indices: Sequence[int]):
        self.rows, self.indices, self.name = rows, indices, rows.name

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """One by one, unless they are neighbours."""
        chosen = self.indices[first:last]
        if isinstance(chosen, range) and chosen.step == 1:
            return self.rows.read(chosen.start, chosen.stop) if chosen else []
        return [self.rows[int(index)] for index in chosen]

    def checksum(self) -> str:
        """Of the others, and which are chosen."""
        return xxh3_128(f"{self.rows.checksum()} {np.asarray(self.indices).tolist()}".encode()).hexdigest()

    def where(self, index: int) -> str:
        """Among the others."""
        return self.rows.where(int(self.indices[index]))

    def number(self, index: int) -> int:
        """Among the others."""
        return self.rows.number(int(self.indices[index]))


class Joined(Rows):
    """Rows one after another, of several files or splits."""

    def __init__(self, parts: Sequence[Rows], name: str):
        self.parts, self.name = parts, name
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Of each part its share."""
        found: list[dict[str, Any]] = []
        for part, end in zip(self.parts, self.ends, strict=True):
            start = end - len(part)
            if first < end and last > start:
                found += part.read(max(first - start, 0), min(last, end) - start)
        return found

    def checksum(self) -> str:
        """Of all parts."""
        return xxh3_128(" ".join(part.checksum() for part in self.parts).encode()).hexdigest()

    def where(self, index: int) -> str:
        """In its part."""
        place = bisect_right(self.ends, index)
        return self.parts[place].where(index - (self.ends[place] - len(self.parts[place])))


def load_rows(
    data: str, split: str, revision: str | None = None, data_dir: str | None = None, config: str | None = None
) -> Rows:
    """The rows of one split of a folder, of a file or of a data set on the hub; "train[90%:]" and "train+test" too.

    `revision` is a hub's, `data_dir` the folder inside in which the files are, `config` a configuration of its card. A
    hub's files are taken from the cache; what is not there is fetched, if there is network. Raises UserError without
    such data.
    """
    import datasets

    names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
    parts = {name: _open(data_paths(data, name, revision, data_dir, config), f"{data}, {name}") for name in names}
    if list(names) == [split]:
        return parts[split]
    try:
        reading = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in parts.items()}
        )
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{data}: its split {split} is not understood ({error}); write train[90%:] or train[:500]"
        ) from None
    pieces = [parts[part.splitname].select(range(len(parts[part.splitname]))[part.from_ : part.to]) for part in reading]
    return pieces[0] if len(pieces) == 1 else Joined(pieces, data)


def data_paths(
    data: str, split: str, revision: str | None = None, data_dir: str | None = None, config: str | None = None
) -> list[Path]:
    """The files of a split (grow.data.files). Raises UserError as load_rows does."""
    if os.path.isfile(data):
        if not data_format(data):
            raise UserError(f"{data}: not a format of rows (see README: JSONL, CSV, Parquet)")
        return [Path(data)]
    if os.path.isdir(data):
        folder = Path(data)
        there = [path.relative_to(folder).as_posix() for path in files_below(data)]
        return [folder / name for name in split_files(there, folder.joinpath, split, data_dir, config, data)]
    if data.startswith((".", "/", "~")) or not _DATA_NAME.fullmatch(data):
        hint = " (python recipes/gemma3_270m/fetch.py brings it)" if "gemma3_270m" in data else ""
        raise UserError(f"{data}: no such folder of data{hint}")
    from huggingface_hub import constants

    source = Repository(data, "dataset", revision or "main")

    def choose(names: list[str], read: Callable[[str], Path]) -> list[str]:
        return split_files(names, read, split, data_dir, config, str(source))

    found = source.cached(choose)
    if found is None:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{source}: its split {split} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set; fetch it "
                "with launch/prepare.sh RECIPE where there is network"
            )
        found = source.fetch(choose)
    return found


def _open(paths: list[Path], where: str) -> Rows:
    from grow.data.table_files import read_table
    from grow.data.text_files import read_text

    kind = data_format(paths[0].name)
    read = read_table if kind in (".parquet", ".arrow") else read_text
    try:
        parts = [read(_unpacked(path), kind, path.name) for path in paths]
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds, all of them about what is in the file
        raise UserError(f"{where}: cannot be read: {innermost(error)}") from error
    return parts[0] if len(parts) == 1 else Joined(parts, where)


def _unpacked(path: Path) -> Path:
    """The file itself, or what is packed in it, which is kept in the cache of `datasets` by what the file holds."""
    kind = path.suffix.lower()
    if kind not in _PACKED:
        return path
    import datasets
    from filelock import FileLock

    place = Path(datasets.config.HF_DATASETS_CACHE) / "grow" / "unpacked" / file_checksum(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_file():
            unready = place.with_suffix(".partial")
            with _PACKED[kind](path) as packed, unready.open("wb") as out:
                shutil.copyfileobj(packed, out, _BLOCK)
            unready.replace(place)
    return place


def file_checksum(path: Path) -> str:
    """XXH3-128 of a file's bytes."""
    facts = path.stat()
    return _checksum(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=32)
def _checksum(path: Path, size: int, changed: int) -> str:
    digest = xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
