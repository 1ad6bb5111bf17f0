"""Rows → tokens, with labels on what is to be learnt.

A row's text is tokenised as a whole, as inference does it, and cut by the characters that tokens stand for: a token
across the border of prompt and completion is the completion's. The tokens of a split are made once, by as many
processes as there are cores, and kept in the cache of `datasets` as Arrow files that all ranks map into memory.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128

from grow.data.rows import BrokenRow, Rows
from grow.data.special import BREAK, SpecialTokens, unguarded
from grow.data.template import Span, Template
from grow.errors import UserError

IGNORED = -100
_FORMAT = 1  # of what is cached: raised when the same rows come to other tokens
_MANY = 20_000  # rows from which on several processes are worth their start
_AT_A_TIME = 1000
_SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("learnt", pa.list_(pa.uint8())), ("bad", pa.string())])


@dataclass(frozen=True)
class Example:
    """One row in tokens. `labels[t]` is the token that `input_ids[: t + 1]` should be followed by, or IGNORED."""

    input_ids: list[int]
    labels: list[int]


Made = tuple[list[int], np.ndarray]
"""A row's ids, and which of them are learnt, uint8."""


@dataclass(frozen=True)
class Shown:
    """A row as a person sees it: its text with what begins and ends it, and the spans that are learnt; and its tokens,
    each with whether it is learnt."""

    text: str
    spans: list[Span]
    ids: list[int]
    learnt: list[bool]


class Encoder:
    """Makes tokens of rows by a template. `end`: whether an end token follows a completion, and is learnt.

    It can be sent to another process, which reads the tokenizer from its folder again.
    """

    def __init__(self, tokenizer: Any, template: Template, end: bool = True):
        self.template, self.end = template, end
        self._set(tokenizer)

    def _set(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, SpecialTokens(tokenizer)
        self.fast = bool(tokenizer.is_fast)
        if self.fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "end": self.end, "folder": self.tokenizer.name_or_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.template, self.end = state["template"], state["end"]
        self._set(AutoTokenizer.from_pretrained(state["folder"], local_files_only=True))

    def begin(self) -> list[int]:
        """The token before a prompt, where the tokenizer has one and the prompt does not write it itself."""
        first = self.tokenizer.bos_token
        if self.template.messages or not first or self.template.prompt.startswith(first):
            return []
        return [self.tokenizer.bos_token_id]

    def final(self) -> list[int]:
        """The token after a completion, likewise."""
        last = self.tokenizer.eos_token
        if self.template.messages or not self.end or not last or self.template.completion.endswith(last):
            return []
        return [self.tokenizer.eos_token_id]

    def table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """Rows as a table of `tokens`, `learnt` (1 where the token is) and `bad` (why the row cannot be used)."""
        texts: list[str] = []
        spans: list[list[Span]] = []
        bad: list[str | None] = []
        for row in rows:
            try:
                text = self._text(row)
                texts.append(text.text)
                spans.append(text.learnt)
                bad.append(None)
            except ValueError as error:
                bad.append(str(error))
        encoded = iter(self._encode(texts, spans))
        ids, marks = [], []
        for index, reason in enumerate(bad):
            own: list[int] = []
            learnt: np.ndarray = np.zeros(0, np.uint8)
            if reason is None:
                try:
                    own, learnt = self._whole(next(encoded))
                except ValueError as error:
                    own, learnt, bad[index] = [], np.zeros(0, np.uint8), str(error)
            ids.append(own)
            marks.append(learnt)
        offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
        tokens = np.fromiter((number for own in ids for number in own), np.int32)
        learnt = np.concatenate([np.zeros(0, np.uint8), *marks])
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (tokens, learnt)]
        return pa.table([*columns, pa.array(bad, pa.string())], schema=_SCHEMA)

    def _text(self, row: dict[str, Any]) -> Any:
        if isinstance(row, BrokenRow):
            raise ValueError(row.reason)
        return self.template.text(row, self.tokenizer, self.special.guard)

    def _whole(self, made: Made | ValueError) -> Made:
        """With begin and end. Raises ValueError where nothing is left to learn."""
        if isinstance(made, ValueError):
            raise made
        ids, learnt = made
        first, last = self.begin(), self.final()
        ids = [*first, *ids, *last]
        learnt = np.concatenate([np.zeros(len(first), np.uint8), learnt, np.ones(len(last), np.uint8)])
        if not learnt[1:].any():
            raise ValueError("without a token to learn")
        return ids, learnt

    def _encode(self, texts: list[str], spans: list[list[Span]]) -> Iterator[Made | ValueError]:
        """Ids of each text and which of them are learnt, or why it cannot be."""
        if not self.fast:
            for text, own in zip(texts, spans, strict=True):
                yield self._slowly(text, own)
            return
        backend = self.tokenizer.backend_tokenizer
        plain = backend.encode_batch([text for text in texts if BREAK not in text], add_special_tokens=False)
        encodings = iter(plain)
        for text, own in zip(texts, spans, strict=True):
            if BREAK not in text:
                encoding = next(encodings)
                yield encoding.ids, _learnt(encoding, own, len(text))
                continue
            encoding, moved = self.special.encode(text)
            own = [(moved.place(begin), moved.place(end)) for begin, end in own]
            try:
                yield self.special.own_ids(encoding.ids), _learnt(encoding, own, len(moved.text))
            except ValueError as error:
                yield error

    def _slowly(self, text: str, spans: list[Span]) -> Made:
        """By a tokenizer that does not say which characters a token stands for: by what begins alike."""
        text, spans = (moved := unguarded(text)).text, [(moved.place(a), moved.place(b)) for a, b in spans]

        def ids(part: str) -> list[int]:
            return self.tokenizer(part, add_special_tokens=False, split_special_tokens=BREAK in text).input_ids

        whole = ids(text)
        learnt = np.zeros(len(whole), np.uint8)
        for begin, end in spans:
            first, last = _alike(whole, ids(text[:begin])), len(ids(text[:end]))
            learnt[first : last if end < len(text) else len(whole)] = 1
        return whole, learnt

    def shown(self, row: dict[str, Any]) -> Shown:
        """One row for a person. Raises ValueError, in a few words, if it is bad."""
        text = self._text(row)
        moved = unguarded(text.text)
        spans = [(moved.place(begin), moved.place(end)) for begin, end in text.learnt]
        ids, learnt = self._whole(next(self._encode([text.text], [text.learnt])))
        if self.fast:  # a token across a border is learnt as a whole
            offsets = self.tokenizer.backend_tokenizer.encode(moved.text, add_special_tokens=False).offsets
            spans = [(min([a, *(s for s, e in offsets if s < a < e)]), b) for a, b in spans]
        names = self.tokenizer.convert_ids_to_tokens
        before, after = "".join(names(self.begin())), "".join(names(self.final()))
        spans = [(a + len(before), b + len(before)) for a, b in spans]
        if after:  # it follows the completion, which is all that is learnt
            spans = [(spans[0][0], spans[0][1] + len(after))]
        return Shown(before + moved.text + after, spans, ids, (learnt == 1).tolist())


def _learnt(encoding: Any, spans: list[Span], length: int) -> np.ndarray:
    """Which tokens of an encoding have a character of one of the spans; those of none count where they stand."""
    if len(spans) == 1 and spans[0][1] == length:
        learnt = np.zeros(len(encoding.ids), np.uint8)
        places = (encoding.char_to_token(place) for place in range(spans[0][0], length))
        first = next((token for token in places if token is not None), None)
        if first is not None:
            learnt[first:] = 1
        return learnt
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    begin, end = offsets[:, 0], offsets[:, 1]
    learnt = np.zeros(len(offsets), bool)
    for first, last in spans:
        learnt |= np.where(begin < end, (end > first) & (begin < last), (begin >= first) & (begin < last))
    return learnt.astype(np.uint8)


def _alike(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Examples(Sequence[Example]):
    """The usable rows of a split in tokens, read from memory-mapped Arrow when asked for. `rows` are their indices in
    the split, `lengths` the tokens of each (of its input_ids), int64 [N]."""

    def __init__(self, chunks: Sequence[pa.Table], rows: np.ndarray):
        self.rows = rows
        self._parts = [(_lists(chunk["tokens"]), _lists(chunk["learnt"])[1]) for chunk in chunks]
        self._starts = np.cumsum([0, *(len(offsets) - 1 for (offsets, _), _ in self._parts)])
        sizes = [np.diff(offsets) for (offsets, _), _ in self._parts]
        self.lengths = (np.concatenate(sizes)[rows] if sizes else np.zeros(0)).astype(np.int64) - 1
        self._dropped: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, labels = self.arrays(range(len(self))[index])
        return Example(ids.tolist(), labels.tolist())

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and labels of an example, int64 each."""
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

    def drop_labels(self, where: np.ndarray) -> None:
        """Takes labels away for good: bool, one for each token of all examples' labels in a row."""
        self._label_starts = np.cumsum([0, *self.lengths])
        self._dropped = where

    def counts(self) -> tuple[int, int]:
        """Tokens, and labels among them."""
        used = self._used()
        return int(self.lengths.sum()), sum(int(_inner(p, u, 1).sum()) for p, u in zip(self._parts, used, strict=True))

    def largest(self) -> int:
        """The largest id of any token; −1 without one."""
        return max((int(values.max()) for (_, values), _ in self._parts if len(values)), default=-1)

    def _used(self) -> list[np.ndarray]:
        """For each chunk, which of its rows are used."""
        mask = np.zeros(int(self._starts[-1]), bool)
        mask[self.rows] = True
        return [mask[a:b] for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]

    def checksum(self) -> str:
        """XXH3-128 of all tokens and of which are learnt, in order."""
        tokens, marks = xxh3_128(), xxh3_128()
        for part, used in zip(self._parts, self._used(), strict=True):
            tokens.update(np.ascontiguousarray(_inner(part, used, 0, False)).tobytes())
            marks.update(_inner(part, used, 1, False).tobytes())
        sizes = xxh3_128(self.lengths.tobytes()).hexdigest()
        return xxh3_128(f"{tokens.hexdigest()} {marks.hexdigest()} {sizes}".encode()).hexdigest()


def _inner(part: Any, used: np.ndarray, which: int, after_first: bool = True) -> np.ndarray:
    """The values of a chunk's used rows, tokens (0) or marks (1); without each row's first, which has no label."""
    (offsets, values), marks = part
    keep = np.repeat(used, np.diff(offsets))
    if after_first:
        starts = offsets[:-1][used & (np.diff(offsets) > 0)] - offsets[0]
        keep[starts] = False
    chosen = marks if which else values
    return chosen[offsets[0] : offsets[-1]][keep]


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists in one chunk, without a copy."""
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return chunk.offsets.to_numpy(), chunk.values.to_numpy()


@dataclass
class Encoded:
    """Rows in tokens. `bad` holds the indices of rows that were left out, by what is wrong with them; `where` says of
    an index which row that is."""

    examples: Examples
    bad: dict[str, list[int]]
    rows: Rows | None = None

    def check(self, what: str, max_bad_rows: float) -> None:
        """Says on stderr which rows were left out. Raises UserError if they are more than a share of all, or all."""
        count = sum(map(len, self.bad.values()))
        if count:
            total = len(self.examples) + count
            line = f"{what}: {count} of {total} rows cannot be used: {self.reasons()}"
            if count > max_bad_rows * total:
                raise UserError(f"{line}; that is more than max_bad_rows {max_bad_rows:g}: mend the data or raise it")
            print(line, file=sys.stderr)
        if not self.examples:
            raise UserError(f"{what}: has no row that can be used{': ' + self.reasons() if count else ''}")

    def reasons(self) -> str:
        """What is wrong with which rows; the commonest first."""
        kinds = sorted(self.bad.items(), key=lambda item: -len(item[1]))
        said = [
            f"{len(rows)} {why} (row {', '.join(map(str, map(self._number, rows[:5])))}{', …' if len(rows) > 5 else ''})"
            for why, rows in kinds[:4]
        ]
        place = self.rows.where(kinds[0][1][0]) if self.rows is not None and kinds else ""
        more = [f"and {len(kinds) - 4} kinds more"] if len(kinds) > 4 else []
        first = [f"the first is in {place.partition(': ')[2]}"] if ": " in place else []
        return "; ".join(said + more + first)

    def _number(self, row: int) -> int:
        return self.rows.number(row) if self.rows is not None else row


def all_learnt(rows: list[list[int]]) -> Examples:
    """Rows that are tokens already, every one of which has a label but the first."""
    offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())
    tokens = np.fromiter((number for ids in rows for number in ids), np.int32)
    columns = [pa.ListArray.from_arrays(offsets, pa.array(v)) for v in (tokens, np.ones(len(tokens), np.uint8))]
    table = pa.table([*columns, pa.nulls(len(rows), pa.string())], schema=_SCHEMA)
    return Examples([table], np.arange(len(rows)))


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: Any, template: Template, max_length: int = 0, end: bool = True
) -> Encoded:
    """Rows in tokens, in memory. Only what is to be learnt (and an end token after a completion) has labels.

    Rows of more than `max_length` tokens are bad; 0 takes any. Raises UserError for a template that does not fit.
    """
    kept = rows if isinstance(rows, Rows) else list(rows)
    _check_columns(kept, template)
    encoder = Encoder(tokenizer, template, end)
    parts = [encoder.table(kept[first : first + _AT_A_TIME]) for first in range(0, len(kept), _AT_A_TIME)]
    return _sorted_out(parts, max_length, kept if isinstance(kept, Rows) else None)


def encode_cached(rows: Rows, tokenizer: Any, template: Template, max_length: int, end: bool = True) -> Encoded:
    """The same as `encode` of many rows, by several processes and from the cache the next time.

    It is kept by what the rows' files hold, the template, the tokenizer's files and the libraries' versions.
    """
    _check_columns(rows, template)
    return _sorted_out(_cached_parts(rows, tokenizer, template, end), max_length, rows)


def _check_columns(rows: Sequence[dict[str, Any]], template: Template) -> None:
    if isinstance(rows, Rows):
        template.check(rows.columns(template.columns()))
    elif rows:
        template.check(list(dict.fromkeys(name for row in rows for name in row)))


def _cached_parts(rows: Rows, tokenizer: Any, template: Template, end: bool) -> list[pa.Table]:
    import datasets
    from filelock import FileLock

    key = _key(rows, tokenizer, template, end)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "grow" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes have a core each
    try:
        with FileLock(path.with_suffix(".lock")):  # the first makes it, the others of this machine find it
            made = datasets.Dataset.from_dict({"row": np.arange(len(rows))}).map(
                _Batch(Encoder(tokenizer, template, end), rows), batched=True, batch_size=_AT_A_TIME,
                remove_columns=["row"], features=datasets.Features.from_arrow_schema(_SCHEMA), desc="tokenising",
                cache_file_name=str(path), load_from_cache_file=True, new_fingerprint=key,
                num_proc=_processes(len(rows)),
            )  # fmt: skip
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return [pa.Table.from_batches([batch]) for batch in made.data.table.to_batches()]


class _Batch:
    """What `map` calls, in each of its processes."""

    def __init__(self, encoder: Encoder, rows: Rows):
        self.encoder, self.rows = encoder, rows

    def __call__(self, batch: dict[str, list[int]]) -> pa.Table:
        return self.encoder.table(self.rows[batch["row"][0] : batch["row"][-1] + 1])


def _processes(count: int) -> int | None:
    cores = len(os.sched_getaffinity(0))
    return None if count < _MANY or cores < 2 else min(cores, count // (_MANY // 2), 32)


def _key(rows: Rows, tokenizer: Any, template: Template, end: bool) -> str:
    folder = Path(tokenizer.name_or_path)
    digest = xxh3_128()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and "index" not in file.name:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    used = dataclasses.asdict(template)
    if "strftime_now" not in template.chat_template + str(getattr(tokenizer, "chat_template", "")):
        used["day"] = ""
    libraries = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    facts = [_FORMAT, rows.checksum(), len(rows), sorted(used.items()), end, digest.hexdigest(), libraries]
    return xxh3_128(repr(facts).encode()).hexdigest()


def _sorted_out(parts: list[pa.Table], max_length: int, rows: Rows | None) -> Encoded:
    """Tells usable rows from bad ones."""
    bad: dict[str, list[int]] = {}
    good, done = [], 0
    for part in parts:
        reasons = part["bad"].to_pylist() if part["bad"].null_count < len(part) else []
        for index, reason in enumerate(reasons):
            if reason is not None:
                bad.setdefault(reason, []).append(done + index)
        sizes = np.diff(_lists(part["tokens"])[0])
        fits = sizes > 0
        if max_length:
            fits &= sizes - 1 <= max_length
            for index in np.flatnonzero(sizes - 1 > max_length):
                bad.setdefault(f"longer than {max_length} tokens", []).append(done + int(index))
        good.append(np.flatnonzero(fits) + done)
        done += len(part)
    return Encoded(Examples(parts, np.concatenate(good) if good else np.zeros(0, np.int64)), bad, rows)
