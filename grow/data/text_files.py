"""Rows of text files: JSONL, JSON, CSV, TSV, plain lines.

Cells of CSV are text, a number in JSON keeps its digits, a date stays text. So the files are not turned into typed
columns: where each row begins is noted once, and a row is read when it is asked for, by any process, from the page
cache.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from grow.checkpoint.shards import no_name_twice
from grow.data.rows import BrokenRow, Rows
from grow.errors import UserError

_BLOCK = 2**24
csv.field_size_limit(2**31 - 1)


class Number(float):
    """Keeps a number as it is written in its file: 1.50 is not 1.5, 1e5 not 100000.0."""

    def __new__(cls, text: str) -> "Number":
        """Makes a number of its text."""
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else self.text

    def __reduce__(self) -> Any:
        return Number, (self.text,)


class TextRows(Rows):
    """Reads rows of a text file; `places` are the bytes at which each begins and ends, int64 [N, 2], `parse` reads
    one."""

    def __init__(self, path: Path, places: np.ndarray, parse: Callable[[str], dict[str, Any]]):
        self.path, self.places, self.parse = path, places, parse

    def __len__(self) -> int:
        return len(self.places)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Reads the rows in one piece of the file."""
        if first >= last:
            return []
        begin, end = int(self.places[first, 0]), int(self.places[last - 1, 1])
        with self.path.open("rb") as file:
            file.seek(begin)
            block = file.read(end - begin)
        return [self._row(block[start - begin : stop - begin]) for start, stop in self.places[first:last].tolist()]

    def _row(self, raw: bytes) -> dict[str, Any]:
        try:
            return self.parse(raw.decode("utf-8"))
        except UnicodeDecodeError:
            return BrokenRow("not UTF-8")
        except (ValueError, RecursionError) as error:
            return BrokenRow(str(error) or "unreadable")

    def where(self, index: int) -> str:
        """Returns the file and the line, counted from 1."""
        with self.path.open("rb") as file:
            line, left = 1, int(self.places[index, 0])
            while left:
                block = file.read(min(_BLOCK, left))
                line, left = line + block.count(b"\n"), left - len(block)
        return f"row {index}: {self.name}, line {line}"


class ListRows(Rows):
    """Holds rows in memory, such as those of a JSON file that is one list."""

    def __init__(self, rows: Iterable[Any]):
        self.rows = [row if isinstance(row, dict) else BrokenRow("not a JSON object") for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Returns the rows from memory."""
        return self.rows[first:last]


def read_text(path: Path, kind: str, name: str) -> Rows:
    """Returns the rows of one file; `name` is what messages call it. Raises UserError for a file that is not of its
    kind."""
    facts = path.stat()
    rows = _read(path, kind, facts.st_size, facts.st_mtime_ns)
    rows.path, rows.name = path, name
    return rows


@lru_cache(maxsize=16)
def _read(path: Path, kind: str, size: int, changed: int) -> Rows:
    with path.open("rb") as file:
        start = file.read(4096)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    first = 3 if start.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
    if kind in (".csv", ".tsv"):
        return _csv_file(path, first, "\t" if kind == ".tsv" else ",")
    if kind == ".txt":
        return TextRows(path, _lines(path, first), _line)
    if kind == ".json" and start[first:].lstrip()[:1] != b"{":
        return ListRows(_json_list(path))
    places = _lines(path, first)
    if kind == ".json" and len(places) and isinstance(TextRows(path, places, _object)[0], BrokenRow):
        raise UserError(f"{path}: neither a list of objects nor an object a line")
    return TextRows(path, places, _object)


def _lines(path: Path, first: int) -> np.ndarray:
    """Returns begin and end of each line that is not blank, int64 [N, 2]."""
    ends, done = [], first
    with path.open("rb") as file:
        file.seek(first)
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")).astype(np.int64) + done)
            done += len(block)
        ends.append(np.array([done], np.int64))
        stops = np.concatenate(ends)
        starts = np.concatenate([[first], stops[:-1] + 1])
        kept = starts < stops
        for index in np.flatnonzero(kept & (stops - starts < 16)):
            file.seek(int(starts[index]))
            kept[index] = bool(file.read(int(stops[index] - starts[index])).strip())
    return np.stack([starts[kept], stops[kept]], 1)


def _line(text: str) -> dict[str, Any]:
    return {"text": text.removesuffix("\r")}


def _no_constant(name: str) -> None:
    """Returns None for NaN and Infinity, which are not JSON."""


def _integer(text: str) -> int | Number:
    """Reads a whole number; -0 keeps its spelling."""
    return Number(text) if text == "-0" else int(text)


_parse = json.JSONDecoder(
    parse_float=Number, parse_int=_integer, parse_constant=_no_constant, object_pairs_hook=no_name_twice
).decode


def _object(line: str) -> dict[str, Any]:
    try:
        row = _parse(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _json_list(path: Path) -> list[Any]:
    try:
        rows = _parse(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds no list of objects")
    return rows


def _csv_file(path: Path, first: int, delimiter: str) -> Rows:
    """Opens a CSV file. Records may hold line ends, so the reader itself says where each begins."""
    position = first

    def lines() -> Iterator[str]:
        nonlocal position
        with path.open("rb") as file:
            file.seek(first)
            for raw in file:
                position += len(raw)
                yield raw.decode("utf-8", "replace")

    reader, places, header, start = csv.reader(lines(), delimiter=delimiter, strict=True), [], None, first
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells:
                places.append((start, position))
            start = position
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    if not header:
        raise UserError(f"{path}: is empty")
    if len(set(header)) < len(header):
        raise UserError(f"{path}: two columns have one name: {', '.join(header)}")
    table = np.array(places, np.int64).reshape(-1, 2)
    return TextRows(path, table, partial(_record, header=tuple(header), delimiter=delimiter))


def _record(text: str, header: tuple[str, ...], delimiter: str) -> dict[str, Any]:
    (cells,) = [cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if cells]
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells, the header has {len(header)}")
    return dict(zip(header, cells, strict=True))
