"""Small files, each written whole or not at all; and the checksum of a file of any size."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from grow.errors import UserError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file, and its folder if there is none. Raises UserError if it cannot be written."""
    with written_whole(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as JSON, and the folder if there is none. Raises UserError if it cannot be written."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a name to write under, which becomes `path` at the end. Raises UserError if the disk does not take it."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def checksum(path: Path) -> str:
    """Returns XXH3-128 of a file's bytes."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxh3_128).hexdigest()
