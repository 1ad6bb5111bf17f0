"""Turns a row's text into tokens, with labels on those that are to be learnt.

The text is tokenised as a whole, as in inference, and cut by the characters that tokens stand for: a token across the
border of prompt and completion counts as the completion's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoTokenizer

from grow.checkpoint.hub import FROM_FOLDER
from grow.data.chat import chat_template
from grow.data.examples import SCHEMA
from grow.data.images import Images
from grow.data.rows import BrokenRow
from grow.data.spans import Span, Text, common_start
from grow.data.special import BREAK, PLACE, SpecialTokens, unguarded
from grow.data.template import Template

Made = tuple[list[int], np.ndarray]
"""A row's ids, and which of them are learnt, uint8."""


@dataclass(frozen=True)
class Shown:
    """Holds a row as it is shown to a person: its text with the tokens that begin and end it, and the spans that are
    learnt; its tokens, each with whether it is learnt; and how many images stand before the last of these spans."""

    text: str
    spans: list[Span]
    ids: list[int]
    learnt: list[bool]
    images: int


class Encoder:
    """Tokenises rows by a template. `end` says whether an end token follows a completion, and is learnt.

    It can be sent to another process, which reads the tokenizer from its folder again. Raises UserError for messages
    without a chat template, and for images without a processor.
    """

    def __init__(self, tokenizer: Any, template: Template, end: bool = True):
        self.template, self.end = template, end
        if template.messages:
            chat_template(template, tokenizer)
        self._set(tokenizer)

    def _set(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, SpecialTokens(tokenizer)
        self.fast = bool(tokenizer.is_fast)
        named = (tokenizer.name_or_path, self.template.images, self.template.image_root)
        self.images = Images(*named) if self.template.images else None
        if self.fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "end": self.end, "folder": self.tokenizer.name_or_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.template, self.end = state["template"], state["end"]
        if self.template.images:
            torch.set_num_threads(1)  # torch's threads do not survive a fork, and a processor may use them
        self._set(AutoTokenizer.from_pretrained(state["folder"], **FROM_FOLDER))

    def begin(self) -> list[int]:
        """Returns the token before a prompt, if the tokenizer has one and the prompt does not write it itself."""
        first, template = self.tokenizer.bos_token, self.template
        if template.messages or not first or (template.prompt or template.completion).startswith(first):
            return []
        return [self.tokenizer.bos_token_id]

    def final(self) -> list[int]:
        """Returns the token after a completion, if the tokenizer has one and the completion does not write it
        itself."""
        last = self.tokenizer.eos_token
        if self.template.messages or not self.end or not last or self.template.completion.endswith(last):
            return []
        return [self.tokenizer.eos_token_id]

    def table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """Returns rows as a table of `tokens`, `learnt` (1 where the token is) and `bad` (why the row cannot be
        used)."""
        texts: list[Text] = []
        bad: list[str | None] = []
        for row in rows:
            try:
                texts.append(self._text(row))
                bad.append(None)
            except ValueError as error:
                bad.append(str(error))
        encoded = self._encode(texts)
        ids, marks = [], []
        for index, reason in enumerate(bad):
            made: Made = [], np.zeros(0, np.uint8)
            if reason is None:
                try:
                    made = self._whole(next(encoded))
                except ValueError as error:
                    bad[index] = str(error)
            ids.append(made[0])
            marks.append(made[1])
        return pa.table({"tokens": ids, "learnt": marks, "bad": bad}, schema=SCHEMA)

    def _text(self, row: dict[str, Any]) -> Text:
        if isinstance(row, BrokenRow):
            raise ValueError(row.reason)
        return self._placed(row, self.template.text(row, self.tokenizer, self.special.guard))

    def _placed(self, row: dict[str, Any], text: Text) -> Text:
        return self.images.text(row, text) if self.images else text

    def _whole(self, made: Made | ValueError) -> Made:
        """Adds the tokens of begin and end. Raises ValueError where nothing is left to learn."""
        if isinstance(made, ValueError):
            raise made
        ids, learnt = made
        first, last = self.begin(), self.final()
        ids = [*first, *ids, *last]
        learnt = np.concatenate([np.zeros(len(first), np.uint8), learnt, np.ones(len(last), np.uint8)])
        if not learnt[1:].any():
            raise ValueError("without a token to learn")
        return ids, learnt

    def _encode(self, texts: list[Text]) -> Iterator[Made | ValueError]:
        """Yields each text's ids and which of them are learnt, or the error that prevents it."""
        if not self.fast:
            yield from map(self._slowly, texts)
            return
        plain = [row.text for row in texts if BREAK not in row.text]
        encodings = iter(self.tokenizer.backend_tokenizer.encode_batch(plain, add_special_tokens=False))
        for row in texts:
            if BREAK not in row.text:
                encoding = next(encodings)
                yield encoding.ids, _learnt(encoding, row.learnt, len(row.text))
                continue
            encoding, moved = self.special.encode(row.text)
            spans = [(moved.place(begin), moved.place(end)) for begin, end in row.learnt]
            try:
                yield self.special.own_ids(encoding.ids), _learnt(encoding, spans, len(moved.text))
            except ValueError as error:
                yield error

    def _slowly(self, row: Text) -> Made:
        """Encodes with a tokenizer that does not say which characters a token stands for, by common beginnings of
        ids."""
        spells, moved = BREAK in row.text, unguarded(row.text)
        text, spans = moved.text, [(moved.place(begin), moved.place(end)) for begin, end in row.learnt]

        def ids(part: str) -> list[int]:
            return self.tokenizer(part, add_special_tokens=False, split_special_tokens=spells).input_ids

        whole = ids(text)
        learnt = np.zeros(len(whole), np.uint8)
        for begin, end in spans:
            first, last = common_start(whole, ids(text[:begin])), len(ids(text[:end]))
            learnt[first : last if end < len(text) else len(whole)] = 1
        return whole, learnt

    def shown(self, row: dict[str, Any]) -> Shown:
        """Returns one row to be shown to a person. Raises ValueError, in a few words, if it is bad."""
        unplaced = self.template.text(row, self.tokenizer, self.special.guard)
        text = self._placed(row, unplaced)
        moved = unguarded(text.text)
        spans = [(moved.place(begin), moved.place(end)) for begin, end in text.learnt]
        ids, learnt = self._whole(next(self._encode([text])))
        if self.fast:  # a token across a border is learnt as a whole
            offsets = self.tokenizer.backend_tokenizer.encode(moved.text, add_special_tokens=False).offsets
            spans = [(min([a, *(s for s, e in offsets if s < a < e)]), b) for a, b in spans]
        names = self.tokenizer.convert_ids_to_tokens
        before, after = "".join(names(self.begin())), "".join(names(self.final()))
        if self.images:
            moved = self.images.shortened(moved.text)
            spans = [(moved.place(a), moved.place(b)) for a, b in spans]
        spans = [(a + len(before), b + len(before)) for a, b in spans]
        if after:  # it follows the completion, which is all that is learnt
            spans = [(spans[0][0], spans[0][1] + len(after))]
        images = unplaced.text[: unplaced.learnt[-1][0]].count(PLACE)
        return Shown(before + moved.text + after, spans, ids, (learnt == 1).tolist(), images)


def _learnt(encoding: Any, spans: list[Span], length: int) -> np.ndarray:
    """Returns which tokens of an encoding have a character of one of the spans.

    Some tokenizers (Llama 3's) trim spaces off what a token stands for: one that is a space alone has no character, and
    its place is the end of the space.
    """
    if len(spans) == 1 and spans[0][1] == length:
        learnt, start = np.zeros(len(encoding.ids), np.uint8), spans[0][0]
        places = (encoding.char_to_token(place) for place in range(start, length))
        first = next((token for token in places if token is not None), len(learnt)) if start else 0
        while first and _ends_of_space(encoding.token_to_chars(first - 1)) > start:
            first -= 1
        learnt[first:] = 1
        return learnt
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    begin, end = offsets[:, 0], offsets[:, 1]
    learnt = np.zeros(len(offsets), bool)
    for first, last in spans:
        learnt |= (end > first) & np.where(begin < end, begin < last, begin <= last)
    return learnt.astype(np.uint8)


def _ends_of_space(place: Span | None) -> int:
    """Returns where the space ends that a token without a character stands for; -1 for a token with one."""
    return place[1] if place and place[0] == place[1] else -1
