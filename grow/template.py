"""How a row of a data set becomes text, and which of it is to be learnt."""

import re
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import Any

from grow.errors import UserError


@dataclass(frozen=True)
class Template:
    """How a row becomes text. Either `prompt` and `completion`, which name columns as in "English: {en}"; or
    `messages`, the name of a column of chat messages ({"role": …, "content": …}), for models with a chat template."""

    prompt: str = ""
    completion: str = ""
    messages: str = ""

    def check(self, columns: list[str]) -> None:
        """Raises UserError where it names a column that is not there, or is no template."""
        for name in [self.messages] if self.messages else _names(self.prompt + self.completion):
            if name not in columns:
                what = (
                    f"messages: {name}" if self.messages else f"the template {self.prompt + self.completion!r}: {name}"
                )
                raise UserError(f"{what} is not among the columns {', '.join(columns)}")

    def pieces(self, row: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
        """The row's text in pieces, each with whether it is to be learnt.

        Raises UserError as check does, ValueError where the row has no text.
        """
        self.check(list(row))
        if self.messages:
            return _turns(row[self.messages], tokenizer)
        if any(row[name] is None for name in _names(self.prompt + self.completion)):
            raise ValueError("without a value in a column")
        before, after = self.prompt.format(**row), self.completion.format(**row)
        if not after.strip():
            raise ValueError("empty")
        return [(tokenizer.bos_token or "", False), (before, False), (after, True)]

    def texts(self, row: dict[str, Any]) -> list[str]:
        """What the row itself brings to its text, column by column (of messages, turn by turn)."""
        if self.messages:
            turns = row[self.messages]
            return [str(turn.get("content")) for turn in turns if isinstance(turn, dict)] if turns else []
        fields = dict.fromkeys(name for _, name, _, _ in Formatter().parse(self.prompt + self.completion) if name)
        return [f"{{{name}}}".format(**row) for name in fields]


@cache
def _names(template: str) -> list[str]:
    """The columns that a template names, "translation" of "{translation[en]}"."""
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"the template {template!r} is none ({error}); a brace in the text is written twice") from None
    return [re.split(r"[.\[]", name)[0] for name in fields]


def _turns(messages: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    """A conversation by the tokenizer's chat template; what the assistant says is to be learnt."""
    if not isinstance(messages, list) or not any(
        isinstance(m, dict) and m.get("role") == "assistant" for m in messages
    ):
        raise ValueError("without an assistant's turn")
    pieces, text = [], ""
    for index, message in enumerate(messages):
        spoken = message.get("role") == "assistant"
        if spoken:
            asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            pieces.append((asked.removeprefix(text), False))
            text = asked
        so_far = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if spoken:
            pieces.append((so_far.removeprefix(text), True))
            text = so_far
    return pieces
