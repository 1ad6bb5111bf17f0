"""The rows of a data set, read when they are asked for, whatever files they are in.

What stands in a file is what a template gets (grow.data.text_files, grow.data.table_files), and rows need not have the
same columns or types.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from xxhash import xxh3_128

_BLOCK = 2**24


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
