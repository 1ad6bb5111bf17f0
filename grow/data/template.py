"""Templates turn a row of a data set into text, and say which of it is to be learnt."""

from _string import formatter_field_name_split  # what string.Formatter itself takes names apart with
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import Any

from grow.data.chat import conversation_text
from grow.data.conversation import PLACEHOLDER, conversation
from grow.data.images import placed, values_of
from grow.data.spans import Guard, Text
from grow.data.special import PLACE
from grow.errors import UserError


@dataclass(frozen=True)
class Template:
    """Turns a row into text by either `prompt` and `completion`, which name columns as in "English: {en}"; or
    `messages`, the name of a column of chat messages ({"role": …, "content": …}), for models with a chat template.

    `chat_template` is the text of a template that replaces the tokenizer's own. `day` (2026-11-28) is given to
    templates that write the date, so that rows are the same whenever a run resumes. `images` names a column of images,
    whose paths are relative to the folder `image_root` (grow.data.images).
    """

    prompt: str = ""
    completion: str = ""
    messages: str = ""
    chat_template: str = ""
    day: str = ""
    images: str = ""
    image_root: str = ""

    def check(self, columns: list[str]) -> None:
        """Raises UserError if it names a column that is not there, or is not a valid template."""
        template = self.prompt + self.completion
        for name in [self.messages] if self.messages else _columns(template, tuple(columns)):
            if name not in columns:
                what = "messages" if self.messages else f"the template {template!r}"
                raise UserError(f"{what}: {name} is not among the columns {', '.join(columns)}")
        if self.images and self.images not in columns:
            raise UserError(f"images: {self.images} is not among the columns {', '.join(columns)}")

    def columns(self) -> list[str]:
        """Returns the columns that the template names."""
        images = [self.images] if self.images else []
        if self.messages:
            return [self.messages, *images]
        named = [name for _, name, _, _ in _parsed(self.prompt + self.completion) if name is not None]
        return [*(str(formatter_field_name_split(name)[0]) for name in named), *images]

    def text(self, row: Mapping[str, Any], tokenizer: Any, guard: Guard = str) -> Text:
        """Returns the row's text, in which PLACE stands for each image. Raises ValueError, in a few words, if the row
        has none that could be learnt."""
        if self.messages:
            return conversation_text(row, self, tokenizer, guard)
        images = len(values_of(row, self.images)) if self.images else 0
        own_image = (PLACE if images else "") if self.images else None
        before = self.fill(self.prompt, row, placed(guard) if images else guard, own_image)
        after = self.fill(self.completion, row, guard)
        if not after.strip():
            raise ValueError("empty")
        if PLACE not in before:
            before = PLACE * images + before
        return Text(before + after, [(len(before), len(before) + len(after))])

    def fill(self, template: str, row: Mapping[str, Any], guard: Guard = str, image: str | None = None) -> str:
        """Returns `prompt` or `completion` with a row's values, and with `image` in the place of an image's in its own
        words. Raises ValueError if a value is missing or no text."""
        own_image = PLACEHOLDER if image is None else image
        pieces = _filled(template, row)
        return "".join(text.replace(PLACEHOLDER, own_image) if own else guard(text) for text, own in pieces)

    def pieces(self, row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """Returns the text of a row's prompt in pieces, each with whether it is of the template's own words. Raises
        ValueError as `fill` does."""
        return [(text, own) for text, own in _filled(self.prompt, row) if text]

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the row's own texts, column by column (messages: turn by turn); [] if the row is bad."""
        try:
            if self.messages:
                return [turn["content"] for turn in conversation(row, self.messages, 0 if self.images else None)]
            names = {name: spec for _, name, spec, _ in _parsed(self.prompt + self.completion) if name is not None}
            return [_written(_value(row, name), spec, name) for name, spec in names.items()]
        except ValueError:
            return []


def _filled(template: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yields a template's text and a row's values in turn, each with whether it is of the template's own words."""
    for literal, name, spec, conversion in _parsed(template):
        yield literal, True
        if name is not None:
            value = Formatter().convert_field(_value(row, name), conversion)
            yield _written(value, spec, name), False


@cache
def _parsed(template: str) -> list[tuple[str, str | None, str, str | None]]:
    """Returns literal text, a field's name, its format and conversion, as string.Formatter takes them apart."""
    try:
        return [(text, name, spec or "", conversion) for text, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"the template {template!r} is not one ({error}); a brace that is text is written twice"
        ) from None


@cache
def _columns(template: str, columns: tuple[str, ...]) -> list[str]:
    """Returns the columns that a template names otherwise than as a whole, "translation" of "{translation[en]}"."""
    found = []
    for _, name, _, _ in _parsed(template):
        if name is None or name in columns:
            continue
        first, rest = formatter_field_name_split(name)
        steps = list(rest)
        if any(is_attribute for is_attribute, _ in steps):
            raise UserError(
                f"the template {template!r}: {{{name}}}: what is inside a column is written with brackets, "
                f"{{{first}{''.join(f'[{step}]' for _, step in steps)}}}"
            )
        found.append(str(first))
    return found


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        value, steps = row[name], []
    else:
        first, rest = formatter_field_name_split(name)
        value, steps = row.get(str(first)), list(rest)
    for is_attribute, step in steps:
        if is_attribute:
            raise ValueError(f"without a value at {name}")
        try:
            value = value[str(step)] if isinstance(value, Mapping) else value[step]
        except (LookupError, TypeError):
            raise ValueError(f"without a value at {name}") from None
    if value is None:
        raise ValueError("without a value in a column" if not steps else f"without a value at {name}")
    return value


def _written(value: Any, spec: str, name: str) -> str:
    """Returns a value as it stands in its file."""
    if isinstance(value, (list, tuple, Mapping, bytes)) or not hasattr(value, "__format__"):
        raise ValueError(f"a {type(value).__name__}, not a text, at {name}")
    if isinstance(value, bool) and not spec:
        return "true" if value else "false"
    try:
        text = format(value, spec)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} does not take the format {spec!r} ({error})") from None
    return text
