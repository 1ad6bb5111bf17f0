"""Rows of a data set → prompt and completion → tokens and labels → packed sequences of one fixed length.

Packing puts several rows into one sequence; their positions restart at 0, by which transformers' attention keeps them
apart (only if it gets no attention mask and no cache). What is packed together and in which order it is seen depends
on the rows, the seed, the length and the epoch alone, never on the number of ranks.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from grow.errors import UserError
from grow.template import Template

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One row in tokens. `labels[t]` is the token that `input_ids[: t + 1]` should be followed by, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


def load_rows(data: str, split: str, revision: str | None = None, data_dir: str | None = None) -> Any:
    """The rows of one split of a folder (JSONL, Parquet, CSV) or of a hub data set, as a datasets.Dataset.

    `revision` is a hub's, `data_dir` the folder inside in which the files are.

    Bytes that are not UTF-8 come as U+FFFD, by which `encode` finds the rows. Raises UserError without such data.
    """
    import datasets

    if data.startswith((".", "/", "~")) and not os.path.isdir(data):
        hint = " (python recipes/gemma3_270m/fetch.py brings it)" if "gemma3_270m" in data else ""
        raise UserError(f"{data}: no such folder of data{hint}")
    folder = os.path.join(data, data_dir or "")
    text = os.path.isdir(folder) and any(name.endswith((".jsonl", ".json", ".csv")) for name in os.listdir(folder))
    # Under this name of UTF-8, and no other, the library decodes by itself and heeds what is said of errors.
    decoding = {"encoding": "utf_8", "encoding_errors": "replace"} if text else {}
    try:
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        return datasets.load_dataset(data, split=split, revision=revision, data_dir=data_dir, **decoding)
    except Exception as error:  # the library raises many kinds, all of them about what was asked for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{data}: its split {split} cannot be loaded ({reason})") from error


@dataclass
class Encoded:
    """Rows in tokens. `bad` holds the indices of rows that were left out, by what is wrong with them."""

    examples: list[Example]
    bad: dict[str, list[int]]

    def check(self, what: str, max_bad_rows: float) -> None:
        """Says on stderr which rows were left out. Raises UserError if they are more than a share of all."""
        count = sum(map(len, self.bad.values()))
        if not count:
            return
        kinds = "; ".join(
            f"{len(rows)} {why} (row {', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''})"
            for why, rows in self.bad.items()
        )
        total = len(self.examples) + count
        line = f"{what}: {count} of {total} rows cannot be used: {kinds}"
        if count > max_bad_rows * total:
            raise UserError(f"{line}; that is more than max_bad_rows {max_bad_rows:g}: mend the data or raise it")
        print(line, file=sys.stderr)


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: Any, template: Template, max_length: int = 0, end: bool = True
) -> Encoded:
    """Fills the template with each row's columns and tokenises. Only what is to be learnt (and an end token after a
    completion) has labels. Rows of more than `max_length` tokens are bad; 0 takes any.

    Pieces are tokenised apart, so that where one ends does not depend on the next.
    """
    bad: dict[str, list[int]] = {}
    kept: list[tuple[int, list[tuple[str, bool]]]] = []
    for index, row in enumerate(rows):
        try:
            pieces = template.pieces(row, tokenizer)
            if any("\ufffd" in text for text, _ in pieces):
                raise ValueError("not UTF-8")
            kept.append((index, [piece for piece in pieces if piece[0]]))
        except UserError:
            raise
        except ValueError as error:
            bad.setdefault(str(error), []).append(index)
    texts = [text for _, pieces in kept for text, _ in pieces]
    tokens = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    final = [tokenizer.eos_token_id] if end and not template.messages else []
    examples = []
    for index, pieces in kept:
        ids: list[int] = []
        labels: list[int] = []
        for _, learnt in pieces:
            piece = next(tokens)
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        ids, labels = ids + final, labels + final
        if max_length and len(ids) - 1 > max_length:
            bad.setdefault(f"longer than {max_length} tokens", []).append(index)
        else:
            examples.append(Example(ids[:-1], labels[1:]))
    return Encoded(examples, bad)


def pack(examples: list[Example], max_length: int, seed: int = 0) -> tuple[list[list[int]], int]:
    """Shares examples out to sequences of at most `max_length` tokens: best fit, the longest first.

    Returns the indices of the examples in each sequence, and how many were too long for any.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda i: -len(examples[i].input_ids))
    packed: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences, by the tokens they have left
    too_long = 0
    for index in order:
        length = len(examples[index].input_ids)
        if length > max_length:
            too_long += 1
            continue
        room = next((room for room in range(length, max_length + 1) if with_room[room]), None)
        if room is None:
            room = max_length
            with_room[room].append(len(packed))
            packed.append([])
        sequence = with_room[room].pop()
        packed[sequence].append(index)
        with_room[room - length].append(sequence)
    return packed, too_long


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Sequences of exactly `max_length` tokens: input_ids, position_ids, labels, rows; each [max_length], int64.

    `rows` is the example's index at each position, −1 at the padding (which stands as a row of its own at the end).
    """

    def __init__(self, examples: list[Example], max_length: int, pad_token_id: int, seed: int = 0):
        self.examples, self.max_length, self.pad_token_id = examples, max_length, pad_token_id
        self.packed, _ = pack(examples, max_length, seed)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        rows: list[int] = []
        for row in self.packed[index]:
            example = self.examples[row]
            length = len(example.input_ids)
            tokens += example.input_ids
            positions += range(length)
            labels += example.labels
            rows += [row] * length
        padding = self.max_length - len(tokens)
        return {
            "input_ids": torch.tensor(tokens + [self.pad_token_id] * padding),
            "position_ids": torch.tensor(positions + list(range(padding))),
            "labels": torch.tensor(labels + [IGNORED] * padding),
            "rows": torch.tensor(rows + [-1] * padding),
        }


def read_sequences(recipe: Any, tokenizer: Any, split: str) -> PackedDataset:
    """One split of a grow.recipe.Recipe's data, packed; bad rows are named. Raises UserError for rows that cannot be
    used, if they are too many or all."""
    encoded = encode(recipe.rows(split), tokenizer, recipe.template, recipe.max_length)
    encoded.check(f"{recipe.data}, {split}", recipe.max_bad_rows)
    if not encoded.examples:
        raise UserError(f"{recipe.data}: its split {split} has no row that can be used")
    return PackedDataset(encoded.examples, recipe.max_length, tokenizer.pad_token_id or 0, recipe.seed)


class Epochs(Dataset[dict[str, Tensor]]):
    """The sequences of a whole run in the order in which they are seen: item i is a function of i alone.

    Each epoch is a permutation drawn from (seed, epoch). So a run that resumes at any step, on any number of ranks,
    goes on where it was by counting.
    """

    def __init__(self, sequences: PackedDataset, length: int, seed: int):
        self.sequences, self.length, self.seed = sequences, length, seed
        self._epoch, self._order = -1, Tensor()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.sequences))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self.sequences[int(self._order[place])]

    def seen(self) -> Dataset[dict[str, Tensor]]:
        """Each sequence that the run comes to, once: all, unless it ends within its first epoch."""
        return Subset(self.sequences, self._permutation(0)[: self.length].tolist())

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        return torch.randperm(len(self.sequences), generator=generator)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks sequences into a batch, [B, max_length] each."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
