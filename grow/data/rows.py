"""The rows of a data set, read when they are asked for, whatever files they are in.

A template gets the values as they stand in the file (grow.data.text_files, grow.data.table_files), and rows need not
have the same columns or types.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from xxhash import xxh3_128

from grow.checkpoint.files import checksum


class BrokenRow(dict[str, Any]):
    """Stands for a row that cannot be read, with the reason."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason


class Rows(Sequence[dict[str, Any]]):
    """Reads rows when asked for. A row that cannot be read is a BrokenRow, so that the others can be used."""

    name = ""
    path: Path
    """The file that the rows are in; rows of several files have none."""

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Returns the rows of this range, which lies within their number."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def checksum(self) -> str:
        """Returns XXH3-128 of the bytes of the rows' file."""
        return file_checksum(self.path)

    def where(self, index: int) -> str:
        """Returns a row's place, for messages."""
        return f"row {index}"

    def number(self, index: int) -> int:
        """Returns a row's index in the whole split."""
        return index

    def file(self, index: int) -> Path | None:
        """Returns the file that a row is in; None where that is not known."""
        return getattr(self, "path", None)

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
        """Returns some of the rows, in the order of `indices`."""
        return Selection(self, indices)

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """Returns the names of the columns; of the first rows alone, if these have all that are wanted."""
        found: dict[str, None] = {}
        for index, row in enumerate(self):
            found.update(dict.fromkeys(row))
            if index >= 999 and all(name in found for name in wanted):
                break
        return list(found)


class Selection(Rows):
    """Holds some of the rows of other ones."""

    def __init__(self, rows: Rows, indices: Sequence[int]):
        self.rows, self.indices, self.name = rows, indices, rows.name

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Reads the rows one by one, unless they are neighbours."""
        chosen = self.indices[first:last]
        if isinstance(chosen, range) and chosen.step == 1:
            return self.rows.read(chosen.start, chosen.stop) if chosen else []
        return [self.rows[int(index)] for index in chosen]

    def checksum(self) -> str:
        """Returns a checksum of the others and of which rows are chosen."""
        return xxh3_128(f"{self.rows.checksum()} {np.asarray(self.indices).tolist()}".encode()).hexdigest()

    def where(self, index: int) -> str:
        """Returns a row's place among the others."""
        return self.rows.where(int(self.indices[index]))

    def number(self, index: int) -> int:
        """Returns a row's index among the others."""
        return self.rows.number(int(self.indices[index]))

    def file(self, index: int) -> Path | None:
        """Returns the file that a row is in."""
        return self.rows.file(int(self.indices[index]))


class Joined(Rows):
    """Joins the rows of several files or splits, one after another."""

    def __init__(self, parts: Sequence[Rows], name: str):
        self.parts, self.name = parts, name
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Reads each part's share of the range."""
        found: list[dict[str, Any]] = []
        for part, end in zip(self.parts, self.ends, strict=True):
            start = end - len(part)
            if first < end and last > start:
                found += part.read(max(first - start, 0), min(last, end) - start)
        return found

    def checksum(self) -> str:
        """Returns a checksum of all parts."""
        return xxh3_128(" ".join(part.checksum() for part in self.parts).encode()).hexdigest()

    def where(self, index: int) -> str:
        """Returns a row's place in its part."""
        part, place = self._part(index)
        return part.where(place)

    def file(self, index: int) -> Path | None:
        """Returns the file that a row is in."""
        part, place = self._part(index)
        return part.file(place)

    def _part(self, index: int) -> tuple[Rows, int]:
        place = bisect_right(self.ends, index)
        return self.parts[place], index - (self.ends[place] - len(self.parts[place]))


def file_checksum(path: Path) -> str:
    """Returns XXH3-128 of a file's bytes."""
    facts = path.stat()
    return _checksum(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=32)
def _checksum(path: Path, size: int, changed: int) -> str:
    return checksum(path)
