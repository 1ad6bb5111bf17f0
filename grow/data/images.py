"""Images in rows: where they stand in a row's text, and what a model is given of them.

A column (`images` in a recipe) has a path, bytes, an Image of `datasets`, or a list of these. `<image>` in a row's text
says where each stands; without one they stand before the prompt, or what the user says first. The checkpoint's own
processor decides what text an image becomes, and makes tensors of it.
"""

import contextlib
import io
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import load_image
from xxhash import xxh3_128, xxh3_128_hexdigest

from grow.data.conversation import PLACEHOLDER
from grow.data.processor import processor_of_images
from grow.data.rows import Rows
from grow.data.spans import Guard, Text
from grow.data.special import PLACE, Moved
from grow.errors import UserError

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What a model calls the inputs that say which tokens are of an image, [L] int64 each."""


class Images:
    """Knows the processor of a checkpoint, and the column of a data set that has images; paths are relative to
    `root`.

    Raises UserError for a checkpoint without a processor for images, or with one that is not known here.
    """

    def __init__(self, folder: str, column: str, root: str):
        self.processor, self.column, self.root = processor_of_images(folder), column, Path(root)
        self.blank = self._features([load_image_of(_blank(), self.root)])

    def text(self, row: Mapping[str, Any], text: Text) -> Text:
        """Returns a row's text with what the processor writes for each image in its place. Raises ValueError where
        places and images are not as many, or for an image that cannot be read."""
        there, places = values_of(row, self.column), text.text.count(PLACE)
        if places != len(there):
            raise ValueError(f"with {len(there)} images and {places} places for them ({PLACEHOLDER})")
        if not there:
            return text
        made = self.processor.image_processor(self._read(there), return_tensors="pt")
        words = iter([self.processor.replace_image_token(made, place) for place in range(len(there))])
        moved = Moved(text.text, re.compile(PLACE), lambda _: next(words))
        return Text(moved.text, [(moved.place(begin), moved.place(end)) for begin, end in text.learnt])

    def shortened(self, text: str) -> Moved:
        """Returns a text in which each image's many tokens are one, to be shown to a person."""
        names = self.processor.tokenizer.convert_ids_to_tokens(self.processor.image_token_ids)
        run = re.compile("|".join(f"(?:{re.escape(str(name))})+" for name in names))
        return Moved(text, run, lambda found: next(str(name) for name in names if found.startswith(str(name))))

    def inputs(self, row: Mapping[str, Any], ids: list[int], first: int | None = None) -> dict[str, Tensor]:
        """Returns what a model is given beside the ids of a row: tensors of its images, [images, …] each, or of so many
        of the `first`, and which tokens are an image's, [L] int64. Of a row without images nothing."""
        there = values_of(row, self.column)[:first]
        if not there:
            return {}
        found = self._features(self._read(there))
        if self.processor.return_mm_token_type_ids:
            names = self.processor.model_input_names
            name = next((name for name in TOKEN_TYPES if name in names), TOKEN_TYPES[-1])
            found[name] = torch.tensor(self.processor.create_mm_token_type_ids([ids])[0])
        return found

    def _features(self, images: list[Any]) -> dict[str, Tensor]:
        made = self.processor.image_processor(images, return_tensors="pt")
        return {name: value for name, value in made.items() if name not in self.processor.unused_input_names}

    def _read(self, values: list[Any]) -> list[Any]:
        return [load_image_of(value, self.root) for value in values]


class PlacedImages(Rows):
    """Rows whose images may be named from the folder of the rows' own file, as in an imagefolder of `datasets`: there
    they are looked for first. Their names become those from `root`."""

    def __init__(self, rows: Rows, column: str, root: str):
        self.rows, self.column, self.root, self.name = rows, column, Path(root), rows.name

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Returns the rows of this range."""
        return [self._placed(row, index) for index, row in enumerate(self.rows.read(first, last), first)]

    def _placed(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        file, value = self.rows.file(index), row.get(self.column)
        if file is None or file.parent == self.root or not value:
            return row
        placed = [self._from_root(one, file.parent) for one in value] if isinstance(value, list) else None
        return row | {self.column: placed or self._from_root(value, file.parent)}

    def _from_root(self, value: Any, folder: Path) -> Any:
        name = _file_of(value)
        try:
            there = name is not None and "://" not in name[:10] and (folder / name).is_file()
        except (OSError, ValueError):  # a text that is no path
            there = False
        return os.path.relpath(folder / str(name), self.root) if there else value

    def checksum(self) -> str:
        """Returns that of the rows."""
        return self.rows.checksum()

    def where(self, index: int) -> str:
        """Returns a row's place, for messages."""
        return self.rows.where(index)

    def number(self, index: int) -> int:
        """Returns a row's index in the whole split."""
        return self.rows.number(index)


class RowImages:
    """Makes the tensors of the images of a split's rows, when they are asked for. `token_ids` are those that stand for
    an image in a row's ids, `blank` is what a blank image becomes."""

    def __init__(self, images: Images, rows: Rows):
        self._images, self._rows, self.token_ids = images, rows, images.processor.image_token_ids
        self.blank = images.blank

    def inputs(self, index: int, ids: list[int]) -> dict[str, Tensor]:
        """Returns what a model is given beside the ids of a row, by its index in the split (Images.inputs). Raises
        UserError if an image has gone since the row was tokenised."""
        try:
            return self._images.inputs(self._rows[index], ids)
        except ValueError as error:
            raise UserError(f"{self._rows.where(index)}: {error}; it was there when the rows were tokenised") from error

    @cached_property
    def files(self) -> str:
        """What tells the files of images from others (files_digest), wherever they lie."""
        return files_digest(self._rows, self._images.column, self._images.root)


def files_digest(rows: Rows, column: str, root: Path, changed: bool = False) -> str:
    """Returns a digest of the files that rows name in a column of images: of their names and sizes, and of when they
    were `changed`. "" where images lie in the rows' own files, whose checksums tell."""
    if not any(isinstance(_file_of(value), str) for row in rows[:1000] for value in values_of(row, column)):
        return ""
    digest = xxh3_128()
    for row in rows:
        for name in filter(None, map(_file_of, values_of(row, column))):
            try:
                facts = (root / name).stat()
                digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns if changed else ''}\n".encode())
            except (OSError, ValueError):
                digest.update(f"{name} is not there\n".encode())
    return digest.hexdigest()


def values_of(row: Mapping[str, Any], column: str) -> list[Any]:
    """Returns a row's images as they stand in its column: none, one, or a list."""
    value = row.get(column)
    values = value if isinstance(value, list) else [value]
    return [one for one in values if one not in (None, "") and not (isinstance(one, Mapping) and not any(one.values()))]


def _file_of(value: Any) -> str | None:
    """Returns the path of an image that is a file of its own."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) else None


def image_checksums(row: Mapping[str, Any], column: str, root: str) -> list[str]:
    """Returns a checksum of each of a row's images that can be read."""
    found = []
    for value in values_of(row, column):
        with contextlib.suppress(ValueError):
            found.append(xxh3_128_hexdigest(_bytes(value, Path(root))))
    return found


def placed(guard: Guard) -> Guard:
    """Returns a guard that leaves the places of images, which it marks, outside of what it guards."""
    return lambda text: PLACE.join(guard(part) for part in text.split(PLACEHOLDER))


def load_image_of(value: Any, root: Path) -> Any:
    """Returns an image of a row, decoded, in RGB and upright. Raises ValueError, in a few words, if it cannot be
    read."""
    raw = _bytes(value, root)
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(raw))
        found = load_image(image)
    except Exception as error:  # the library raises many kinds, all of them about what is in the file
        raise ValueError("with an image that cannot be read") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"with an image of more than 8 bits a value ({image.mode}), which would be cut; convert it")
    return found


def _bytes(value: Any, root: Path) -> bytes:
    """Returns an image of a row as it is in its file. Raises ValueError where there is none."""
    if isinstance(value, Mapping):  # an Image of `datasets`
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if "://" in value[:10]:
            raise ValueError("with an image that is an address; fetch it first")
        try:
            value = (root / value).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"with an image that is not there ({root / value})") from None
        except (OSError, ValueError) as error:  # such as a text that is an image in base64
            raise ValueError(
                f"with an image that is no file ({value[:40]}: {getattr(error, 'strerror', error)})"
            ) from None
    if not isinstance(value, bytes):
        raise ValueError(f"with an image that is a {type(value).__name__}")
    return value


def _blank() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(file, "PNG")
    return file.getvalue()
