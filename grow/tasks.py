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
from torch.utils.data import Dataset

from grow.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One row in tokens. `labels[t]` is the token that `input_ids[: t + 1]` should be followed by, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


def load_rows(data: str, split: str, revision: str | None = None) -> Any:
    """The rows of one split of a folder (JSONL, Parquet, CSV) or of a hub data set, as a datasets.Dataset."""
    import datasets

    if data.startswith((".", "/", "~")) and not os.path.isdir(data):
        hint = " (python recipes/gemma3_270m/fetch.py brings it)" if "gemma3_270m" in data else ""
        raise UserError(f"{data}: no such folder of data{hint}")
    try:
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        return datasets.load_dataset(data, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds, all of them about what was asked for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{data}: its split {split} cannot be loaded ({reason})") from error


def fill(rows: Iterable[dict[str, Any]], prompt: str, completion: str) -> tuple[list[str], list[str]]:
    """The prompts and the completions of rows. Raises UserError where a template names a column that is not there."""
    prompts, completions = [], []
    for row in rows:
        try:
            prompts.append(prompt.format(**row))
            completions.append(completion.format(**row))
        except (KeyError, IndexError, ValueError) as error:
            columns = ", ".join(row)
            raise UserError(
                f"the template {prompt + completion!r} does not fit the columns {columns} ({error})"
            ) from None
    return prompts, completions


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: Any, prompt: str, completion: str, end: bool = True
) -> list[Example]:
    """Fills the templates with each row's columns and tokenises. Only the completion (and an end token) has labels.

    Prompt and completion are tokenised apart, so that where one ends does not depend on the other.
    """
    prompts, completions = fill(rows, prompt, completion)
    if not prompts:
        return []
    examples = []
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    final = [tokenizer.eos_token_id] if end else []
    for before, after in zip(
        tokenizer(prompts, add_special_tokens=False).input_ids,
        tokenizer(completions, add_special_tokens=False).input_ids,
        strict=True,
    ):
        ids = start + before + after + final
        ignored = len(start) + len(before) - 1
        examples.append(Example(ids[:-1], [IGNORED] * ignored + ids[1 + ignored :]))
    return examples


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
        self.packed, self.too_long = pack(examples, max_length, seed)

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
            generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.sequences), generator=generator)
        return self.sequences[int(self._order[place])]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks sequences into a batch, [B, max_length] each."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
