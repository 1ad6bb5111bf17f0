"""Opens the rows of a folder, of a file, or of a data set on the hub."""

import bz2
import gzip
import lzma
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from filelock import FileLock
from huggingface_hub import constants

from grow.checkpoint.hub import Repository
from grow.data.files import data_format, files_below, split_files
from grow.data.rows import Joined, Rows, file_checksum
from grow.data.table_files import read_table
from grow.data.text_files import read_text
from grow.errors import UserError, innermost

_DATA_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BLOCK = 2**24
_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
    ".lz4": partial(pyarrow.input_stream, compression="lz4"),
}  # fmt: skip


def load_rows(
    data: str, split: str, revision: str | None = None, data_dir: str | None = None, config: str | None = None
) -> Rows:
    """Returns the rows of one split of a folder, of a file or of a data set on the hub; also of "train[90%:]" and
    "train+test".

    `revision` is a hub's, `data_dir` the folder inside in which the files are, `config` a configuration of its card. A
    hub's files are taken from the cache; missing ones are fetched, if there is network. Raises UserError if there is no
    such data.
    """
    names = dict.fromkeys(re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split))
    parts = {name: _open(_paths(data, name, revision, data_dir, config), f"{data}, {name}") for name in names}
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


def _paths(data: str, split: str, revision: str | None, data_dir: str | None, config: str | None) -> list[Path]:
    """Returns the files of a split (grow.data.files). Raises UserError as load_rows does."""
    if os.path.isfile(data):
        if not data_format(data):
            raise UserError(f"{data}: not a format of rows (see README: JSONL, CSV, Parquet)")
        return [Path(data)]
    if os.path.isdir(data):
        folder = Path(data)
        there = [path.relative_to(folder).as_posix() for path in files_below(data)]
        return [folder / name for name in split_files(there, folder.joinpath, split, data_dir, config, data)]
    if data_format(data):
        raise UserError(f"{data}: no such file; it is looked for from {os.getcwd()}")
    if data.startswith((".", "/", "~")) or not _DATA_NAME.fullmatch(data):
        hint = " (python recipes/gemma3_270m/fetch.py brings it)" if "gemma3_270m" in data else ""
        raise UserError(f"{data}: no such folder of data{hint}")
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
    """Returns the file itself, or its unpacked copy, which is kept in the cache of `datasets` by the file's
    checksum."""
    kind = path.suffix.lower()
    if kind not in _PACKED:
        return path
    place = Path(datasets.config.HF_DATASETS_CACHE) / "grow" / "unpacked" / file_checksum(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_file():
            unready = place.with_suffix(".partial")
            with _PACKED[kind](path) as packed, unready.open("wb") as out:
                shutil.copyfileobj(packed, out, _BLOCK)
            unready.replace(place)
    return place
