"""Renders a conversation by a chat template."""

import re
from datetime import date, datetime
from functools import cache
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from grow.data.conversation import Turn
from grow.data.spans import Span
from grow.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a template marks the assistant's text itself."""

# A template that writes the date asks for it by this name; it is given the run's day, at midnight.
_ON_A_DAY = (
    "{%- macro strftime_now(form) -%}{%- set now = namespace(text=form) -%}{%- for code, value in day_parts.items() -%}"
    "{%- set now.text = now.text.replace(code, value) -%}{%- endfor -%}{{- now.text -}}{%- endmacro -%}"
)


def render_chat(
    turns: list[Turn], source: str, tools: Any, tokens: dict[str, Any], day: str, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    """Returns the template's text, and the spans that its own `{% generation %}` gives. `tokens` is the tokenizer's
    special_tokens_map.

    Raises ValueError where the template refuses the conversation, UserError where it is not a template.
    """
    marked = bool(GENERATION.search(source))
    try:
        texts, spans = render_jinja_template(
            [turns], tools=tools, chat_template=_ON_A_DAY + source, return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt, **tokens, day_parts=_day_parts(day),
        )  # fmt: skip
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template, line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"refused by the chat template ({' '.join(str(error).split())[:120]})") from error
    return texts[0], [tuple(span) for span in spans[0]] if marked and spans else []


@cache
def _day_parts(day: str) -> dict[str, str]:
    """Returns the values of strftime's codes."""
    start = datetime.combine(date.fromisoformat(day) if day else date.today(), datetime.min.time())
    codes = [f"%{sign}{letter}" for letter in "aAbBcdDeFfHIjmMpSTuUwWxXyYzZ" for sign in ("", "-")]
    return {code: start.strftime(code) for code in codes} | {"%%": "%"}
