"""Rows of Parquet and Arrow files, through `datasets`."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grow.data.rows import Rows, file_checksum
from grow.data.text_files import Number


class TableRows(Rows):
    """Rows of typed columns, from Parquet or Arrow: a datasets.Dataset, which is mapped into memory."""

    def __init__(self, table: Any, path: Path, name: str):
        self.table, self.path, self.name = table.data, path, name

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
        """Of the file's bytes."""
        return file_checksum(self.path)

    def columns(self, wanted: Sequence[str] = ()) -> list[str]:
        """Of the table."""
        return list(self.table.column_names)


def read_table(path: Path, kind: str, name: str) -> Rows:
    """The rows of one file: the parts of a split need not have the same columns, where no template looks."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if kind == ".arrow":
        return TableRows(datasets.Dataset.from_file(str(path)), path, name)
    with _no_word_of_its_own():
        return TableRows(datasets.Dataset.from_parquet(str(path)), path, name)


@contextlib.contextmanager
def _no_word_of_its_own() -> Iterator[None]:
    """What the library logs of a file that it cannot read, it also raises."""
    from datasets import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
