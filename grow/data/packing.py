"""Packs examples into sequences of one fixed length.

Packing puts several rows into one sequence; their positions restart at 0, by which transformers' attention keeps them
apart (only if it gets no attention mask and no cache). The sequences and their order depend on the rows, the seed, the
length and the epoch alone, never on the number of ranks.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from grow.data.examples import Examples
from grow.data.images import TOKEN_TYPES
from grow.data.labels import IGNORED

OF_TOKENS = ("input_ids", "position_ids", "labels", "rows")
"""What a sequence has of its tokens."""


def pack(lengths: np.ndarray, max_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shares examples of these lengths out to sequences of at most `max_length` tokens: best fit, the longest first.

    Returns the examples of all sequences in a row, int64 [N], and where each sequence begins in it, int64 [S + 1].
    Examples that are longer than any sequence are left out. Examples of equal length are placed together: the sequence
    with the least room that suffices takes as many as fit, then the next.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).numpy()
    order = order[lengths[order] <= max_length]
    order = order[np.argsort(-lengths[order], kind="stable")]
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    room: list[list[int]] = [[] for _ in range(max_length + 1)]  # sequences, by the tokens they have left
    sequence_of, count = np.empty(len(order), np.int64), 0
    for size, first, last in zip((-sizes).tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(order)], strict=True):
        left = size
        while first < last:
            left = next((r for r in range(left, max_length + 1) if room[r]), max_length)
            each = left // size
            wanted = -(-(last - first) // each)
            if room[left]:
                taken = room[left][-wanted:][::-1]
                del room[left][-wanted:]
            else:
                taken = list(range(count, count + wanted))
                count += wanted
            placed = np.repeat(np.array(taken, np.int64), each)[: last - first]
            sequence_of[first : first + len(placed)] = placed
            first += len(placed)
            full = len(placed) // each
            room[left - each * size] += taken[:full]
            if full < len(taken):
                room[left - (len(placed) - each * full) * size].append(taken[full])
    by_sequence = np.argsort(sequence_of, kind="stable")
    starts = np.searchsorted(sequence_of[by_sequence], np.arange(count + 1))
    return order[by_sequence], starts


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Holds sequences of exactly `max_length` tokens: input_ids, position_ids, labels, rows; each [max_length], int64.

    `rows` is the example's index at each position, −1 at the padding (which counts as a row of its own at the end). An
    example with images has a sequence of its own, which also has tensors of these, [images, …] each, and which of its
    tokens are an image's (grow.data.images).
    """

    def __init__(self, examples: Examples, max_length: int, pad_token_id: int, seed: int = 0):
        self.examples, self.max_length, self.pad_token_id = examples, max_length, pad_token_id
        self._pictured = examples.have_images()
        alone = np.maximum(examples.lengths, np.where(self._pictured, max_length, 0))
        self.packed, self.starts = pack(alone, max_length, seed)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = self.max_length
        item = {
            "input_ids": torch.full((length,), self.pad_token_id),
            "position_ids": torch.zeros(length, dtype=torch.int64),
            "labels": torch.full((length,), IGNORED),
            "rows": torch.full((length,), -1),
        }
        place = 0
        for row in self.packed[self.starts[index] : self.starts[index + 1]].tolist():
            ids, labels = self.examples.arrays(row)
            part = slice(place, place + len(ids))
            item["input_ids"][part], item["labels"][part] = torch.from_numpy(ids), torch.from_numpy(labels)
            item["position_ids"][part], item["rows"][part] = torch.arange(len(ids)), row
            place += len(ids)
        item["position_ids"][place:] = torch.arange(length - place)
        return item | self._of_images(index, place)

    def _of_images(self, index: int, length: int) -> dict[str, Tensor]:
        """Returns what a sequence has beside its tokens, of which so many are not padding."""
        row = int(self.packed[self.starts[index]])
        found = self.examples.inputs(row) if self._pictured[row] else {}
        for name in TOKEN_TYPES:
            if name in found:
                found[name] = nn.functional.pad(found[name], (0, self.max_length - length))
        return found


def summary(sequences: PackedDataset) -> str:
    """Sums up packed rows in a line."""
    tokens, labels = sequences.examples.counts()
    padding = 1 - tokens / max(1, len(sequences) * sequences.max_length)
    return (
        f"{len(sequences.examples):,} rows, {tokens:,} tokens, {labels:,} of them learnt, in {len(sequences):,} "
        f"sequences of {sequences.max_length}; {padding:.1%} padding"
    )


class Epochs(Dataset[dict[str, Tensor]]):
    """Yields `length` items, epoch after epoch over packed sequences, each epoch in its own order.

    Item i is sequence number i % N of epoch i // N, whose order is a permutation drawn from (seed, epoch). So a run
    that resumes at any step, on any number of ranks, finds its place by counting. `share` of them are of `sequences`.
    """

    def __init__(self, sequences: PackedDataset, length: int, seed: int):
        self.sequences, self.length, self.seed, self.share = sequences, length, seed, 1.0
        self._epoch, self._order = -1, Tensor()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.sequences))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self.sequences[int(self._order[place])]

    def seen(self) -> Dataset[dict[str, Tensor]]:
        """Returns each sequence that the run comes to, once: all, unless it ends within its first epoch."""
        return Subset(self.sequences, self._permutation(0)[: self.length].tolist())

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        return torch.randperm(len(self.sequences), generator=generator)


class Mixed(Epochs):
    """Yields `length` items of several packed data sets, each epoch after epoch in its own order: a share of them of
    each of `others`, as even as can be at any point, and the rest of the first.

    `rows` of the others are numbered after those of the first, which is `sequences`.
    """

    def __init__(self, sequences: PackedDataset, others: list[tuple[PackedDataset, float]], length: int, seed: int):
        super().__init__(sequences, length, seed)
        shares = np.array([1 - sum(share for _, share in others), *(share for _, share in others)])
        self.share = float(shares[0])
        self._source, self._place = np.empty(length, np.int64), np.empty(length, np.int64)
        taken = np.zeros(len(shares), np.int64)
        for index in range(length):
            source = int(np.argmax(shares * (index + 1) - taken))
            self._source[index], self._place[index] = source, taken[source]
            taken[source] += 1
        self._parts = [Epochs(own, length, seed) for own, _ in others]
        sizes = [len(own.examples) for own in (sequences, *(own for own, _ in others))]
        self._firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._own = int(taken[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, place = int(self._source[index]), int(self._place[index])
        if source == 0:
            return super().__getitem__(place)
        item = self._parts[source - 1][place]
        return item | {"rows": item["rows"].where(item["rows"] < 0, item["rows"] + self._firsts[source])}

    def seen(self) -> Dataset[dict[str, Tensor]]:
        """Returns each sequence of the first data set that the run comes to, once."""
        return Subset(self.sequences, self._permutation(0)[: self._own].tolist())


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks sequences into a batch, [B, max_length] each; of their images the tensors one after another, [images, …].

    Without any image a batch has nothing of them."""
    batch = {}
    for name in dict.fromkeys(name for item in items for name in item):
        if name in TOKEN_TYPES:
            none = torch.zeros_like(items[0]["input_ids"])
            batch[name] = torch.stack([item.get(name, none) for item in items])
        elif name in OF_TOKENS:
            batch[name] = torch.stack([item[name] for item in items])
        else:
            batch[name] = torch.cat([item[name] for item in items if name in item])
    return batch
