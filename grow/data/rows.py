"""The rows of a data set, as its files have them: JSONL, JSON, CSV, TSV, Parquet, Arrow, plain lines.

What stands in a file is what a template gets: cells of CSV are text, a number of JSON keeps its digits, a date stays
the text that it is, and rows need not have the same columns or types. So text files are not turned into typed columns:
where each row begins is noted once, and a row is read when it is asked for, by any process, from the page cache.
"""

import csv
import io
import json
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from xxhash import xxh3_128

from grow.checkpoint.hub import Repository
from grow.data.files import data_format, split_files
from grow.errors import UserError

_BLOCK = 2**24
_DATA_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
csv.field_size_limit(2**31 - 1)


class Number(float):
    """A number that is written as it stood in its file: 1.50 is not 1.5, 1e5 not 100000.0."""

    def __new__(cls, text: str) -> "Number":
        """Of its text."""
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


class TextRows(Rows):
    """Rows of a text file; `places` are the bytes at which each begins and ends, int64 [N, 2], `parse` reads one."""

    def __init__(self, path: Path, places: np.ndarray, parse: Callable[[str], dict[str, Any]]):
        self.path, self.places, self.parse, self.name = path, places, parse, path.name

    def __len__(self) -> int:
        return len(self.places)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """In one piece of the file."""
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

    def checksum(self) -> str:
        """Of the file's bytes."""
        return _file_checksum(self.path, *_state(self.path))

    def where(self, index: int) -> str:
        """File and line, counted from 1."""
        with self.path.open("rb") as file:
            line, left = 1, int(self.places[index, 0])
            while left:
                block = file.read(min(_BLOCK, left))
                line, left = line + block.count(b"\n"), left - len(block)
        return f"row {index}: {self.name}, line {line}"


class ListRows(Rows):
    """The rows of a JSON file that is one list."""

    def __init__(self, path: Path, rows: list[Any]):
        self.path, self.name = path, path.name
        self.rows = [row if isinstance(row, dict) else BrokenRow("not a JSON object") for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """From memory."""
        return self.rows[first:last]

    def checksum(self) -> str:
        """Of the file's bytes."""
        return _file_checksum(self.path, *_state(self.path))


class TableRows(Rows):
    """Rows of typed columns, from Parquet or Arrow: a datasets.Dataset, which is mapped into memory."""

    def __init__(self, table: Any, files: list[Path]):
        self.table, self.files, self.name = table.data, files, files[0].name

    def __len__(self) -> int:
        return self.table.num_rows

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Numbers of 16 and 32 bits as they are written shortest, not as the nearest of 64 bits."""
        import pyarrow as pa

        part = self.table.slice(first, last - first)
        columns = {}
        for name in part.column_names:
            column = part.column(name)
            values = column.to_pylist()
            if column.type in (pa.float16(), pa.float32()):
                kind = column.type.to_pandas_dtype()
                values = [None if value is None else Number(str(kind(value))) for value in values]
            columns[name] = values
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def checksum(self) -> str:
        """Of the files' bytes."""
        return xxh3_128(" ".join(_file_checksum(file, *_state(file)) for file in self.files).encode()).hexdigest()

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """Of the table."""
        return list(self.table.column_names)


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
        reading = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in parts.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{data}: its split {split} is not understood ({error}); write train[90%:] or train[:500]") from None
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
        there = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
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
    formats = data_format(paths[0].name)
    try:
        if formats in (".parquet", ".arrow"):
            return _table(paths, formats)
        parts = [_text_file(_unpacked(path), *_state(path)) for path in paths]
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds, all of them about what is in the file
        raise UserError(f"{where}: cannot be read: {innermost(error)}") from error
    return parts[0] if len(parts) == 1 else Joined(parts, where)


def innermost(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return " ".join(str(error).split())[:300] or type(error).__name__


def _table(paths: list[Path], kind: str) -> Rows:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if kind == ".arrow":
        tables = [datasets.Dataset.from_file(str(path)) for path in paths]
    else:
        # One by one: the parts of a split need not have the same columns, where no template looks.
        tables = [datasets.Dataset.from_parquet(str(_unpacked(path))) for path in paths]
    parts: list[Rows] = [TableRows(table, [path]) for table, path in zip(tables, paths, strict=True)]
    return parts[0] if len(parts) == 1 else Joined(parts, paths[0].parent.name)


def _unpacked(path: Path) -> Path:
    if path.suffix not in (".gz", ".zst", ".xz", ".bz2", ".lz4"):
        return path
    import datasets

    return Path(datasets.DownloadManager().extract(str(path)))


def _state(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=32)
def _file_checksum(path: Path, size: int, changed: int) -> str:
    digest = xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _text_file(path: Path, size: int, changed: int) -> Rows:
    kind = data_format(path.name) or ".jsonl"
    with path.open("rb") as file:
        start = file.read(4096)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    first = 3 if start.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
    if kind in (".csv", ".tsv"):
        return _csv_file(path, first, "\t" if kind == ".tsv" else ",")
    if kind == ".txt":
        return TextRows(path, _lines(path, first), lambda text: {"text": text})
    if kind == ".json" and start[first:].lstrip()[:1] != b"{":
        return ListRows(path, _json_list(path))
    places = _lines(path, first)
    if kind == ".json" and len(places) and isinstance(TextRows(path, places, _object)[0], BrokenRow):
        raise UserError(f"{path}: neither a list of objects nor an object a line")
    return TextRows(path, places, _object)


def _lines(path: Path, first: int) -> np.ndarray:
    """Begin and end of each line that is not blank, int64 [N, 2]."""
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


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON, and no value."""


_parse = json.JSONDecoder(parse_float=Number, parse_constant=_no_constant).decode


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
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds no list of objects")
    return rows


def _csv_file(path: Path, first: int, delimiter: str) -> Rows:
    """Records may hold line ends, so the reader itself says where each begins."""
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
