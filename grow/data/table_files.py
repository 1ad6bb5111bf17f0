"""Rows of Parquet and Arrow files, through `datasets`."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import logging

from grow.data.rows import Rows, file_checksum
from grow.data.text_files import Number


class TableRows(Rows):
    """Reads rows of typed columns, from Parquet or Arrow: the table of a datasets.Dataset, mapped into memory."""

    def __init__(self, table: Any, path: Path, name: str):
        self.table, self.path, self.name = table, path, name

    def __len__(self) -> int:
        return self.table.num_rows

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Reads rows, with values converted by `_reader`."""
        part = self.table.slice(first, last - first)
        columns = {}
        for name in part.column_names:
            column = part.column(name)
            values, read = column.to_pylist(), _reader(column.type)
            columns[name] = [None if value is None else read(value) for value in values] if read else values
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """Returns the names of the table's columns."""
        return list(self.table.column_names)


@cache
def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """Returns a function that converts a value of an Arrow type to the one that is meant; None where that is the same.

    Numbers of 16 and 32 bits get their shortest spelling, not that of the nearest one of 64 bits; NaN and infinity
    become no value. A typed object has all the names that any row's has: those without a value were not in the row's
    own.
    """
    if kind == pa.float64():
        return lambda value: value if isfinite(value) else None
    if pa.types.is_floating(kind):
        number = kind.to_pandas_dtype()
        return lambda value: Number(str(number(value))) if isfinite(value) else None
    if pa.types.is_struct(kind):
        inner = {field.name: _reader(field.type) or (lambda value: value) for field in kind}
        return lambda value: {
            name: made for name, item in value.items() if item is not None and (made := inner[name](item)) is not None
        }
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        read = _reader(kind.value_type)
        return read and (lambda values: [None if value is None else read(value) for value in values])
    return None


def read_table(path: Path, kind: str, name: str) -> Rows:
    """Returns the rows of one file. The parts of a split need not share columns that no template names."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if kind == ".arrow":
        table = datasets.Dataset.from_file(str(path)).data
    elif not (facts := pyarrow.parquet.ParquetFile(path)).metadata.num_rows:
        table = facts.schema_arrow.empty_table()  # such as the last of many parts, which `datasets` does not take
    else:
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # the errors of a file that it cannot read are also raised
        try:
            # By what the file holds: `datasets` itself goes by its name and time, which another file may have.
            kept = os.path.join(datasets.config.HF_DATASETS_CACHE, "grow", file_checksum(path))
            table = datasets.Dataset.from_parquet(str(path), cache_dir=kept).data
        finally:
            logging.set_verbosity(before)
    return TableRows(table, path, name)
