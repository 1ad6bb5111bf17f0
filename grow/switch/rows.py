"""The rows on which a switch is fitted, as tokens of prompts: the end of each is what decides.

On: the task's prompts, as they were tokenised, and with harmless variations of them. Off: text that the base writes,
and near text (grow.switch.near). Nothing comes from outside, unless the user names rows.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grow.data.examples import Examples
from grow.data.labels import IGNORED
from grow.data.of_recipe import other_template, retention_rows, retention_template, sliced, template_of
from grow.data.tokens import encode
from grow.errors import UserError
from grow.recipe import Recipe

Prompt = list[int]
ON_ROWS = 1000
_LEAST = 4  # of each variation


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
    """Returns harmless variations of a task's prompts: other rows with their answers before, a line or a passage
    before, small and capital letters, wider spaces, spaces and line ends after. Each prompt gets one of them, in turn,
    and of few prompts several; of conversations, those with rows before."""
    texts = [text_of(passage, tokenizer)[1].strip() for passage in passages]
    lines = [line.strip() for text in texts for line in text.split("\n") if len(line.strip()) > 20] or ["…"]
    draw = random.Random(0)
    chat = _is_chat(prompts[0], tokenizer)

    def written(change: Callable[[str], str]) -> Callable[[Prompt], Prompt]:
        def make(prompt: Prompt) -> Prompt:
            begin, text = text_of(prompt, tokenizer)
            return [*begin, *ids_of(change(text), tokenizer)]

        return make

    after = _Before(examples, tokenizer, chat)
    kinds: dict[str, Callable[[Prompt], Prompt]] = {"a row before": after, "three rows before": after.three}
    if not chat:
        kinds |= {
            "a line before": written(lambda text: f"{draw.choice(lines)}\n\n{text}"),
            "a passage before": written(lambda text: f"{draw.choice(texts)}\n\n{text}"),
            "small letters": written(str.lower),
            "capital letters": written(str.upper),
            "wider spaces": written(lambda text: text.replace(" ", "  ")),
            **{what: written(f"{{}}{sign}".format) for what, sign in _AFTER.items()},
        }
    count = max(len(prompts), _LEAST * len(kinds))
    # Where there are fewer, each kind gets other ones in each round.
    turns = (prompts[(turn + turn // len(prompts)) % len(prompts)] for turn in range(count))
    made = zip(turns, itertools.cycle(kinds.items()), strict=False)
    found = [(name, change(prompt)) for prompt, (name, change) in made]
    return [Prompts(kind, [prompt for name, prompt in found if name == kind]) for kind in kinds]


_AFTER = {
    "a space after": " ", "two spaces after": "  ", "a tab after": "\t", "a line end after": "\n",
    "two line ends after": "\n\n",
}  # fmt: skip


class _Before:
    """Puts rows of the task, drawn by chance, before a prompt."""

    def __init__(self, examples: Examples, tokenizer: Any, chat: bool):
        self.examples, self.tokenizer, self.draw = examples, tokenizer, random.Random(0)
        self.gap = [] if chat else ids_of("\n\n", tokenizer)

    def __call__(self, prompt: Prompt) -> Prompt:
        ids, labels = self.examples.arrays(self.draw.randrange(len(self.examples)))
        last = [] if labels[-1] in (IGNORED, self.tokenizer.eos_token_id) else [int(labels[-1])]
        return [*ids.tolist(), *last, *self.gap, *prompt[prompt[0] == self.tokenizer.bos_token_id :]]

    def three(self, prompt: Prompt) -> Prompt:
        """Puts three of them there."""
        return self(self(self(prompt)))


def _is_chat(prompt: Prompt, tokenizer: Any) -> bool:
    """Says whether a prompt has special tokens inside, as those of turns are."""
    return any(number in tokenizer.all_special_ids for number in prompt[1:])


def after_rows(prompts: list[Prompt], examples: Examples, tokenizer: Any) -> list[Prompt]:
    """Returns half of the prompts with another row of the task, and its answer, before them, or with three: what asks
    for something else is to be left alone there too."""
    after = _Before(examples, tokenizer, bool(prompts) and _is_chat(prompts[0], tokenizer))
    before: list[Callable[[Prompt], Prompt]] = [list, after, list, after.three]
    # In pairs, since every second prompt is held out.
    return [before[index // 2 % 4](prompt) for index, prompt in enumerate(prompts)]


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
    template = other_template(rows, template_of(recipe))
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


def text_of(prompt: Prompt, tokenizer: Any) -> tuple[Prompt, str]:
    """Returns the BOS token of a prompt, if it has one, and its text."""
    begin = prompt[:1] if prompt and prompt[0] == tokenizer.bos_token_id else []
    return begin, tokenizer.decode(prompt[len(begin) :])


def ids_of(text: str, tokenizer: Any) -> Prompt:
    """Returns a text's tokens, without those that begin and end one."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
