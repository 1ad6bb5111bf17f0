"""The rows on which a switch is fitted, as tokens of prompts: the last token of each is the one that decides.

On: the task's prompts, as they were tokenised, and with harmless variations of them. Off: text that the base writes,
and near text: the task's prompts with the template's own words replaced by what the base writes at that place. Nothing
comes from outside, unless the user names rows.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grow.data.conversation import conversation
from grow.data.examples import IGNORED, Examples
from grow.data.of_recipe import retention_rows, retention_template, rows_of, sliced, template_of
from grow.data.spans import common_start
from grow.data.template import Template
from grow.data.tokens import encode
from grow.data.writing import sampled
from grow.errors import UserError
from grow.recipe import Recipe

Prompt = list[int]
ON_ROWS, NEAR_ROWS = 1000, 400
_WORDS, _FIELD = 12, 24
"""Tokens that the base writes in the place of a template's words, and of a field."""
_COMMON = 0.05
"""Words that the base itself writes at their place this often tell nothing of the task."""


@dataclass(frozen=True)
class Prompts:
    """Holds prompts of one kind, by the name that a table gives it."""

    name: str
    prompts: list[Prompt]


def spread(count: int, most: int) -> list[int]:
    """Returns at most `most` of `count` indices, spread evenly."""
    return [index * count // min(count, most) for index in range(min(count, most))]


def task_prompts(examples: Examples, most: int, whole: bool = False) -> list[Prompt]:
    """Returns prompts of tokenised rows, spread evenly over them; of a row with several answers, up to each in turn.
    `whole`: with the answers."""
    found = []
    for turn, index in enumerate(spread(len(examples), most)):
        ids, labels = examples.arrays(index)
        if whole:
            found.append(ids.tolist())
            continue
        learnt = labels != IGNORED
        begins = [place for place in range(len(ids)) if learnt[place] and (place == 0 or not learnt[place - 1])]
        found.append(ids[: begins[turn % len(begins)] + 1].tolist())
    return found


def variations(examples: Examples, prompts: list[Prompt], passages: list[Prompt], tokenizer: Any) -> list[Prompts]:
    """Returns harmless variations of a task's prompts: another row with its answer before, a line before, small and
    capital letters, wider spaces, a space or a line end after. Each prompt gets one of them, in turn; of conversations,
    the first."""
    lines = [line.strip() for passage in passages for line in _text(passage, tokenizer)[1].split("\n")]
    lines = [line for line in lines if len(line) > 20] or ["…"]
    draw = random.Random(0)
    chat = _is_chat(prompts[0], tokenizer)

    def written(change: Callable[[str], str]) -> Callable[[Prompt], Prompt]:
        def make(prompt: Prompt) -> Prompt:
            begin, text = _text(prompt, tokenizer)
            return [*begin, *_ids(change(text), tokenizer)]

        return make

    kinds: dict[str, Callable[[Prompt], Prompt]] = {"a row before": _Before(examples, tokenizer, chat)}
    if not chat:
        kinds |= {
            "a line before": written(lambda text: f"{draw.choice(lines)}\n\n{text}"),
            "small letters": written(str.lower),
            "capital letters": written(str.upper),
            "wider spaces": written(lambda text: text.replace(" ", "  ")),
            "a space after": written(lambda text: f"{text} "),
            "a line end after": written(lambda text: f"{text}\n"),
        }
    made = zip(prompts, itertools.cycle(kinds.items()))
    found = [(name, change(prompt)) for prompt, (name, change) in made]
    return [Prompts(kind, [prompt for name, prompt in found if name == kind]) for kind in kinds]


class _Before:
    """Puts a row of the task, drawn by chance, before a prompt."""

    def __init__(self, examples: Examples, tokenizer: Any, chat: bool):
        self.examples, self.tokenizer, self.draw = examples, tokenizer, random.Random(0)
        self.gap = [] if chat else _ids("\n\n", tokenizer)

    def __call__(self, prompt: Prompt) -> Prompt:
        ids, labels = self.examples.arrays(self.draw.randrange(len(self.examples)))
        last = [] if labels[-1] in (IGNORED, self.tokenizer.eos_token_id) else [int(labels[-1])]
        return [*ids.tolist(), *last, *self.gap, *prompt[prompt[0] == self.tokenizer.bos_token_id :]]


def _is_chat(prompt: Prompt, tokenizer: Any) -> bool:
    """Says whether a prompt has special tokens inside, as those of turns are."""
    return any(number in tokenizer.all_special_ids for number in prompt[1:])


def after_rows(prompts: list[Prompt], examples: Examples, tokenizer: Any) -> list[Prompt]:
    """Returns half of the prompts with another row of the task, and its answer, before them: what asks for something
    else is to be left alone there too."""
    after = _Before(examples, tokenizer, bool(prompts) and _is_chat(prompts[0], tokenizer))
    # In pairs, since every second prompt is held out.
    return [after(prompt) if index // 2 % 2 else prompt for index, prompt in enumerate(prompts)]


def near_prompts(model: Any, recipe: Recipe, passages: list[Prompt], tokenizer: Any) -> list[Prompt]:
    """Returns near text that the base writes: prompts of the task, cut where words of the template stand, with what it
    writes there instead; the same, cut where a field stands; of conversations, with turns that it has written.

    Where it often writes the template's own words by itself (Question: … Answer:), these tell nothing of the task: then
    also whole prompts with fields that it has written.
    """
    rows, template = rows_of(recipe, recipe.train_split), template_of(recipe)
    chosen = [rows[index] for index in spread(len(rows), NEAR_ROWS)]
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
        return [*self.begin, *_ids(text, self.tokenizer)]


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
    texts = [_text(passage, tokenizer)[1] for passage in passages]
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


def other_rows(data: str, recipe: Recipe, tokenizer: Any) -> list[Prompt]:
    """Returns prompts of another data set, "FOLDER[:80]" too: by the recipe's template if it has its columns, else as
    retention sets are read: a prompt, or a text, whose last token decides. Raises UserError if there is none."""
    rows: Any = ()
    tried = ""
    for split in ("train", "validation", "test"):
        try:
            rows = retention_rows(recipe, split, data)
            break
        except UserError as error:
            tried = tried or str(error)
    if len(rows) < 2:
        raise UserError(tried or f"{data}: has {len(rows)} rows; one is fitted on and one held out, so 2 are needed")
    template = template_of(recipe)
    columns = rows.columns(["text", "prompt", *template.columns()])
    if not set(template.columns()) <= set(columns):
        template = Template("", "{text}") if "text" in columns else Template("{prompt}", "{completion}")
    rows = rows.select(spread(len(rows), ON_ROWS))
    encoded = encode(rows, tokenizer, template, recipe.max_length, end=False)
    if not encoded.examples:
        raise UserError(f"{data}: has no row that can be used: {encoded.reasons()}")
    if "{text}" in template.completion:
        return [example.input_ids for example in encoded.examples]
    return task_prompts(encoded.examples, ON_ROWS)


def retention_prompts(recipe: Recipe, tokenizer: Any, most: int) -> Iterator[Prompts]:
    """Yields the prompts of the recipe's retention rows, set by set, which are looked at and never fitted on."""
    if recipe.retention:
        rows = retention_rows(recipe)
        rows = rows.select(spread(len(rows), most))
        examples = encode(rows, tokenizer, retention_template(recipe), recipe.max_length, end=False).examples
        yield Prompts("retention", task_prompts(examples, most))
    for folder in recipe.retention_sets:
        name = sliced(folder)[0].rstrip("/").rpartition("/")[2]
        yield Prompts(name, other_rows(folder, recipe, tokenizer)[:most])


def _text(prompt: Prompt, tokenizer: Any) -> tuple[Prompt, str]:
    """Returns the BOS token of a prompt, if it has one, and its text."""
    begin = prompt[:1] if prompt and prompt[0] == tokenizer.bos_token_id else []
    return begin, tokenizer.decode(prompt[len(begin) :])


def _ids(text: str, tokenizer: Any) -> Prompt:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


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
