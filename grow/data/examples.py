"""Tokenised rows, mapped into memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_128

from grow.data.images import RowImages
from grow.data.labels import IGNORED

SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("learnt", pa.list_(pa.uint8())), ("bad", pa.string())])
"""The columns of tokenised rows: ids; 1 for each id that is to be learnt; why the row is bad, if it is."""


@dataclass(frozen=True)
class Example:
    """Holds one tokenised row. `labels[t]` is the token that should follow `input_ids[: t + 1]`, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


class Examples(Sequence[Example]):
    """Holds the usable rows of a split in tokens, read from memory-mapped Arrow when asked for. `rows` are their
    indices in the split, `lengths` the numbers of their tokens (of their input_ids), int64 [N]; `images` are those of
    the split's rows, if they may have some."""

    def __init__(self, chunks: Sequence[pa.Table], rows: np.ndarray, images: RowImages | None = None):
        self._chunks, self.rows, self.images = chunks, rows, images
        self._parts = [(lists(chunk["tokens"]), lists(chunk["learnt"])[1]) for chunk in chunks]
        self._starts = np.cumsum([0, *(len(offsets) - 1 for (offsets, _), _ in self._parts)])
        sizes = [np.diff(offsets) for (offsets, _), _ in self._parts]
        self.lengths = (np.concatenate(sizes)[rows] if sizes else np.zeros(0)).astype(np.int64) - 1
        self._dropped: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Examples(self._chunks, self.rows[index], self.images)
        ids, labels = self.arrays(range(len(self))[index])
        return Example(ids.tolist(), labels.tolist())

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns input_ids and labels of an example, int64 each."""
        row = int(self.rows[index])
        part = int(np.searchsorted(self._starts, row, "right")) - 1
        (offsets, values), marks = self._parts[part]
        begin, end = offsets[row - self._starts[part]], offsets[row - self._starts[part] + 1]
        tokens = values[begin:end].astype(np.int64)
        labels = np.where(marks[begin:end] == 1, tokens, IGNORED)[1:]
        if self._dropped is not None:
            start = self._label_starts[index]
            labels[self._dropped[start : start + len(labels)]] = IGNORED
        return tokens[:-1], labels

    def inputs(self, index: int) -> dict[str, Any]:
        """Returns what a model is given beside an example's ids: tensors of its images, [images, …] each, and which of
        its input_ids are an image's; {} without images."""
        if self.images is None:
            return {}
        return self.images.inputs(int(self.rows[index]), self.arrays(index)[0].tolist())

    def have_images(self) -> np.ndarray:
        """Says which examples have an image, bool [N]."""
        if self.images is None:
            return np.zeros(len(self), bool)
        found = []
        for (offsets, values), _ in self._parts:
            before = np.cumsum(np.concatenate([[0], np.isin(values, self.images.token_ids)]))
            found.append(before[offsets[1:]] > before[offsets[:-1]])
        return np.concatenate(found)[self.rows] if found else np.zeros(0, bool)

    def drop_labels(self, where: np.ndarray) -> None:
        """Removes labels for good; `where` has a bool for each token of the concatenated labels of all examples."""
        self._label_starts = np.cumsum([0, *self.lengths])
        self._dropped = where

    def counts(self) -> tuple[int, int]:
        """Returns the number of tokens, and of labels among them."""
        after_first = (pc.list_flatten(pc.list_slice(part["learnt"], 1)) for part in self._used())
        return int(self.lengths.sum()), sum(pc.sum(marks, min_count=0).as_py() for marks in after_first)

    def largest(self) -> int:
        """Returns the largest id of any token; −1 if there is no token."""
        return max((int(values.max()) for (_, values), _ in self._parts if len(values)), default=-1)

    def _used(self) -> Iterator[pa.Table]:
        """Yields the rows of each chunk that are used."""
        mask = np.zeros(int(self._starts[-1]), bool)
        mask[self.rows] = True
        for chunk, first in zip(self._chunks, self._starts[:-1], strict=True):
            yield chunk.filter(pa.array(mask[first : first + len(chunk)]))

    def checksum(self) -> str:
        """Returns XXH3-128 of all tokens and of which are learnt, in order; and of the names and sizes of files of
        images."""
        tokens, marks = xxh3_128(), xxh3_128()
        for part in self._used():
            tokens.update(pc.list_flatten(part["tokens"]).to_numpy())
            marks.update(pc.list_flatten(part["learnt"]).to_numpy())
        sizes = xxh3_128(self.lengths.tobytes()).hexdigest()
        files = f" {self.images.files}" if self.images else ""
        return xxh3_128(f"{tokens.hexdigest()} {marks.hexdigest()} {sizes}{files}".encode()).hexdigest()


def lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns offsets and values of a column of lists in one chunk, without a copy."""
    chunk = column.chunk(0)
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


def all_learnt(rows: list[list[int]]) -> Examples:
    """Makes examples of tokenised rows, in which every token but the first has a label."""
    marks = [np.ones(len(ids), np.uint8) for ids in rows]
    table = pa.table({"tokens": rows, "learnt": marks, "bad": pa.nulls(len(rows), pa.string())}, schema=SCHEMA)
    return Examples([table], np.arange(len(rows)))
