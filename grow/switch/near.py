"""Near text that the base writes: the task's prompts with what it writes in the place of the template's own words."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grow.data.conversation import conversation
from grow.data.of_recipe import rows_of, template_of
from grow.data.spans import common_start
from grow.data.template import Template
from grow.data.tokens import encode
from grow.data.writing import sampled
from grow.recipe import Recipe
from grow.switch.rows import Prompt, ids_of, spread, task_prompts, text_of

_ROWS = 400
_WORDS, _FIELD = 12, 24
"""Tokens that the base writes in the place of a template's words, and of a field."""
_COMMON = 0.05
"""Words that the base itself writes at their place this often tell nothing of the task."""


def near_prompts(model: Any, recipe: Recipe, passages: list[Prompt], tokenizer: Any) -> list[Prompt]:
    """Returns near text that the base writes: prompts of the task, cut where words of the template stand, with what it
    writes there instead; the same, cut where a field stands; of conversations, with turns that it has written.

    Where it often writes the template's own words by itself (Question: … Answer:), these tell nothing of the task: then
    also whole prompts with fields that it has written.
    """
    rows, template = rows_of(recipe, recipe.train_split), template_of(recipe)
    chosen = [rows[index] for index in spread(len(rows), _ROWS)]
    if template.messages:
        found = _other_conversations(chosen, template, passages, tokenizer)
    else:
        found = _Writer(model, tokenizer, passages[0][:1]).near(list(_pieces(chosen, template)))
    return [prompt for prompt in found if len(prompt) <= recipe.max_length]


Pieces = list[tuple[str, bool]]
"""A prompt's text in pieces, each with whether it is of the template's own words."""


@dataclass(frozen=True)
class _Writer:
    """Lets the base write in the places of templates. `begin` are the tokens before a prompt."""

    model: Any
    tokenizer: Any
    begin: Prompt

    def near(self, rows: list[Pieces]) -> list[Prompt]:
        """Returns the near text of rows, which take turns at the places where the base may write."""
        words = [place for place, (text, own) in enumerate(rows[0]) if own and _has_word(text)] if rows else []
        places = [(self.instead_of_words, place) for place in words if place > 0]
        places += [(self.instead_of_a_field, place + 1) for place in words if place + 1 < len(rows[0])]
        found: list[Prompt] = []
        for turn, (write, place) in enumerate(places):
            found += write([row for row in rows[turn :: len(places)] if place < len(row)], place)
        return found

    def instead_of_words(self, rows: list[Pieces], place: int) -> list[Prompt]:
        """Returns prompts up to words of the template, and what the base writes there, as far as these words go."""
        words = rows[0][place][0]
        before = ["".join(text for text, _ in row[:place]) + words[: _first_letter(words)] for row in rows]
        written = self.write(before, _WORDS)
        others = [(b, w) for b, w in zip(before, written, strict=True) if not _same_words(w, words)]
        found = [b + _up_to_end_of(w, words) for b, w in others]
        if len(others) < (1 - _COMMON) * len(rows):
            first = [row[0][0] if row[0][1] else "" for row in rows]
            fields = self.write(first, _FIELD)
            rests = ["".join(text for text, _ in row[place:]) for row in rows]
            found += [a + b.split("\n")[0] + c for a, b, c in zip(first, fields, rests, strict=True)]
        return [self.ids(text) for text in found]

    def instead_of_a_field(self, rows: list[Pieces], place: int) -> list[Prompt]:
        """Returns prompts up to a field, and what the base writes there, cut at any token."""
        draw = random.Random(place)
        before = ["".join(text for text, _ in row[:place]) for row in rows]
        later = [text for text, own in rows[0][place:] if own and _has_word(text)]
        written = self.write(before, _FIELD)
        kept = [
            (b, w)
            for b, w in zip(before, written, strict=True)
            if not any(_letters(text) in _letters(w) for text in later)
        ]
        return [ids[: len(self.ids(b)) + draw.randint(1, _FIELD)] for b, w in kept for ids in [self.ids(b + w)]]

    def write(self, texts: list[str], tokens: int) -> list[str]:
        """Returns what the base writes after each text."""
        prompts = [self.ids(text) for text in texts]
        written = sampled(self.model, prompts, tokens, 0, self.tokenizer, "near text")
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def ids(self, text: str) -> Prompt:
        """Returns a prompt's tokens."""
        return [*self.begin, *ids_of(text, self.tokenizer)]


def _pieces(rows: Sequence[dict[str, Any]], template: Template) -> Iterator[Pieces]:
    """Yields the prompts of usable rows. Of a template without words, those that all prompts begin and end with are the
    template's: instructions may stand in the rows."""
    found: list[Pieces] = []
    for row in rows:
        with contextlib.suppress(ValueError):  # a bad row
            found.append(template.pieces(row))
    if not found or any(own and _has_word(text) for text, own in found[0]):
        yield from found
        return
    texts = ["".join(text for text, _ in row) for row in found]
    first = _common(texts)
    last = _common([text[len(first) :][::-1] for text in texts])[::-1]
    for text in texts:
        pieces = [(first, True), (text[len(first) : len(text) - len(last)], False), (last, True)]
        yield [(piece, own) for piece, own in pieces if piece]


def _other_conversations(
    rows: Sequence[dict[str, Any]], template: Template, passages: list[Prompt], tokenizer: Any
) -> list[Prompt]:
    """Returns the rows' conversations up to their first answer, with the base's text in the place of what users say."""
    texts = [text_of(passage, tokenizer)[1] for passage in passages]
    others = []
    for index, row in enumerate(rows):
        with contextlib.suppress(ValueError):  # a bad row
            turns = conversation(row, template.messages)
            said = [
                turn | {"content": texts[(index + place) % len(texts)]} if turn["role"] == "user" else turn
                for place, turn in enumerate(turns)
            ]
            others.append(dict(row) | {template.messages: said})
    examples = encode(others, tokenizer, template).examples
    return task_prompts(examples, len(examples))


def _common(texts: list[str]) -> str:
    """Returns what all texts begin with."""
    return min(texts)[: common_start(min(texts), max(texts))]


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _has_word(text: str) -> bool:
    return bool(_letters(text))


def _first_letter(text: str) -> int:
    return next(place for place, letter in enumerate(text) if letter.isalnum())


def _same_words(written: str, words: str) -> bool:
    """Says whether what is written begins with a template's words."""
    return _letters(written).startswith(_letters(words))


def _up_to_end_of(written: str, words: str) -> str:
    """Cuts what is written after the sign that ends a template's words, such as a colon, if it is there."""
    sign = words.rstrip()[-1:]
    found = -1 if sign.isalnum() else written.find(sign)
    return written if found < 0 else written[: found + 1]
