"""A conversation → one text, and where in it the assistant speaks.

The whole conversation is rendered once by the chat template, and that is the text. A template with `{% generation %}`
says itself what the assistant's is. For others the conversation is rendered once more with marks around what the
assistant says: if that text without its marks is the first one, the marks are where they belong, however the template
moves or shortens turns. A conversation for which it is not is a bad row, never text of another place.
"""

import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from grow.errors import UserError

if TYPE_CHECKING:
    from grow.data.template import Guard, Span, Template, Text

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
          "function": "tool", "observation": "tool"}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = re.compile("gRoW([be])([0-9]+)mArK")

# A template that writes the date asks for it by this name; it is given the run's day, at midnight.
_ON_A_DAY = (
    "{%- macro strftime_now(form) -%}{%- set now = namespace(text=form) -%}{%- for code, value in day_parts.items() -%}"
    "{%- set now.text = now.text.replace(code, value) -%}{%- endfor -%}{{- now.text -}}{%- endmacro -%}"
)

Turn = dict[str, Any]


def chat_template(template: "Template", tokenizer: Any, tools: Any = None) -> str:
    """The text of the chat template. Raises UserError where there is none."""
    if template.chat_template:
        return template.chat_template
    try:
        return tokenizer.get_chat_template(None, tools=tools)
    except ValueError as error:
        raise UserError(
            "the base's tokenizer has no chat template, which messages need: take the instruction-tuned base, or name "
            f"a file with one in the field chat_template ({str(error).splitlines()[0][:120]})"
        ) from None


def conversation(row: Mapping[str, Any], column: str) -> list[Turn]:
    """A row's turns, {"role", "content"} with a text in each. ShareGPT's names and parts of text are understood.

    Raises ValueError for what is not a conversation.
    """
    turns = row.get(column)
    if isinstance(turns, str):
        turns = _from_json(turns, "the messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError("without an assistant's turn")
    found = [turn for turn in map(_turn, turns) if turn["content"] or turn["role"] != "system"]
    if not any(turn["role"] == "assistant" for turn in found):
        raise ValueError("without an assistant's turn")
    return found


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError("a turn that is not an object with role and content")
    # Typed columns give every turn every key; one that is null is not there.
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.pop("from", None) if "role" not in turn and "from" in turn else turn.get("role")
    content = turn.pop("value", None) if "content" not in turn and "value" in turn else turn.get("content")
    if not isinstance(role, str):
        raise ValueError("a turn without a role")
    turn["role"] = _ROLES.get(role, role)
    if "tool_calls" in turn:
        turn["tool_calls"] = [_tool_call(call) for call in _listed(turn["tool_calls"], "tool_calls")]
    turn["content"] = _content(content, allow_empty=bool(turn.get("tool_calls")) or turn["role"] in ("system", "tool"))
    try:
        json.dumps(turn, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    return turn


def _content(content: Any, allow_empty: bool) -> str:
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("a part of a turn that is not text")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"a turn whose content is not text but {type(content).__name__}")
    if not (content or "").strip() and not allow_empty:
        raise ValueError("an empty turn")
    return content or ""


def _tool_call(call: Any) -> Any:
    if not isinstance(call, dict):
        raise ValueError("a tool call that is not an object")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError("a tool call without a name")
    inner = {key: value for key, value in inner.items() if value is not None}
    if isinstance(inner.get("arguments"), str):  # OpenAI's way; templates expect the object
        inner["arguments"] = _from_json(inner["arguments"] or "{}", "a tool call's arguments")
    return call | {"function": inner} if "function" in call else inner


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{what} are a text that is not JSON") from None


def _listed(value: Any, what: str) -> list[Any]:
    value = _from_json(value, what) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"{what} that is not a list")
    return value


def conversation_text(row: Mapping[str, Any], template: "Template", tokenizer: Any, guard: "Guard") -> "Text":
    """The text of a row's conversation, and what the assistant says in it, each turn with what ends it.

    Raises ValueError for a conversation that the template refuses or does not write as it is.
    """
    from grow.data.template import Text

    turns = _guarded(conversation(row, template.messages), guard)
    tools = _guarded(_listed(row["tools"], "tools"), guard) if row.get("tools") else None
    source = chat_template(template, tokenizer, tools)
    if tools and "tools" not in source:
        raise ValueError("with tools, which the chat template does not write")
    if any(turn.get("tool_calls") for turn in turns) and "tool_calls" not in source:
        raise ValueError("with tool calls, which the chat template does not write")
    render = partial(_render, source=source, tools=tools or None, tokenizer=tokenizer, day=template.day)
    if _GENERATION.search(source):
        text, spans = render(turns)
    else:
        text, _ = render(turns)
        spans = _marked_spans(text, turns, render, _header_and_end(source, tokenizer, template.day))
    spans = [(begin, end) for begin, end in spans if begin < end]
    if not any(text[begin:end].strip() for begin, end in spans):
        raise ValueError("of what the assistant says the chat template writes nothing")
    return Text(text, spans)


def _guarded(value: Any, guard: "Guard") -> Any:
    """Every text in a conversation but its roles, keys and types."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, list):
        return [_guarded(item, guard) for item in value]
    if isinstance(value, dict):
        return {key: item if key in ("role", "type", "id") else _guarded(item, guard) for key, item in value.items()}
    return value


def _render(
    turns: list[Turn], source: str, tools: Any, tokenizer: Any, day: str, add_generation_prompt: bool = False
) -> tuple[str, list["Span"]]:
    """The template's text, and the spans that its own `{% generation %}` gives."""
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = bool(_GENERATION.search(source))
    try:
        texts, spans = render_jinja_template(
            [turns], tools=tools, chat_template=_ON_A_DAY + source, return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt, **tokenizer.special_tokens_map, day_parts=_day_parts(day),
        )  # fmt: skip
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"refused by the chat template ({' '.join(str(error).split())[:120]})") from error
    return texts[0], [tuple(span) for span in spans[0]] if marked and spans else []


@cache
def _day_parts(day: str) -> dict[str, str]:
    """What strftime's codes stand for."""
    start = datetime.combine(date.fromisoformat(day) if day else date.today(), datetime.min.time())
    codes = [f"%{sign}{letter}" for letter in "aAbBcdDeFfHIjmMpSTuUwWxXyYzZ" for sign in ("", "-")]
    return {code: start.strftime(code) for code in codes} | {"%%": "%"}


def _marked_spans(text: str, turns: list[Turn], render: Any, around: tuple[str, str]) -> list["Span"]:
    header, end = around
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    with_marks, _ = render([_mark(turn, index) if index in spoken else turn for index, turn in enumerate(turns)])
    places: dict[tuple[str, int], int] = {}
    plain, last = [], 0
    for mark in _MARK.finditer(with_marks):
        plain.append(with_marks[last : mark.start()])
        last = mark.end()
        # Some templates write a thought under several names; the first begin and the last end count.
        key, place = (mark[1], int(mark[2])), sum(map(len, plain))
        places[key] = place if mark[1] == "e" else places.get(key, place)
    if "".join(plain) + with_marks[last:] != text:
        raise ValueError("what the assistant says cannot be told apart in the chat template's text")
    spans: list[Span] = []
    for index in spoken:
        floor = spans[-1][1] if spans else 0
        span = _span(text, turns[index], places.get(("b", index)), places.get(("e", index)), floor, header, end)
        if span is not None and span[0] < floor:
            raise ValueError("the chat template writes the assistant's turns in another order")
        spans += [span] if span is not None else []
    return spans


def _mark(turn: Turn, index: int) -> Turn:
    """A turn with marks at what is said, inside the white space around it, which templates trim."""
    begin, finish = f"gRoWb{index}mArK", f"gRoWe{index}mArK"
    turn = dict(turn)
    core = turn["content"].strip()
    if core:
        before, _, after = turn["content"].partition(core)
        turn["content"] = f"{before}{begin}{core}{finish}{after}"
    for name in _REASONING:
        if isinstance(turn.get(name), str) and turn[name].strip():
            thought = turn[name].strip()
            before, _, after = turn[name].partition(thought)
            turn[name] = f"{before}{begin}{thought}{after}"
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_marked_call(call, begin) for call in turn["tool_calls"]]
    return turn


def _marked_call(call: Turn, begin: str) -> Turn:
    inner = call.get("function", call)
    inner = inner | {"name": begin + inner["name"]}
    return call | {"function": inner} if "function" in call else inner


def _span(
    text: str, turn: Turn, begin: int | None, finish: int | None, floor: int, header: str, end: str
) -> "Span | None":
    """Where a turn stands, with what ends it; None where the template leaves it out."""
    more = bool(turn.get("tool_calls")) or any(turn.get(name) for name in _REASONING)
    if turn.get("tool_calls") and begin is None:
        raise ValueError("with tool calls, which the chat template does not write")
    core = turn["content"].strip()
    if finish is None and core:
        if begin is None:
            return None
        raise ValueError("the chat template cuts off what the assistant says")
    lead, _, trail = turn["content"].partition(core) if core else ("", "", "")
    if begin is None:  # the template writes the turn without its begin, a thought most of all
        assert finish is not None
        begin = finish - len(core[len(core) - _common_end(text[:finish], core) :].lstrip())
    place = text.rfind(header, floor, begin) if header else -1
    before = place + len(header) if place >= 0 else floor
    if more:  # a thought or a call: with what the template puts before it
        begin = before if place >= 0 else begin
    elif place >= 0:  # white space of the turn's own, where the template keeps it
        begin -= _common_end(text[before:begin], lead)
    if finish is not None and not text.startswith(end or "\0", finish):
        finish += _common_start(text[finish:], trail)
    stop = finish if finish is not None and not turn.get("tool_calls") else text.find(end, begin) if end else -1
    if stop < 0:
        raise ValueError("where the assistant's turn ends cannot be told in the chat template's text")
    return begin, stop + _common_start(text[stop:], end)


def _common_start(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _common_end(one: str, other: str) -> int:
    return _common_start(one[::-1], other[::-1])


def _header_and_end(source: str, tokenizer: Any, day: str) -> tuple[str, str]:
    """What stands before and after an assistant's turn, in a conversation of two; "" where that cannot be told."""
    return _around(source, day, _Tokens(tokenizer))


class _Tokens:
    """A tokenizer that is the same as any other with its special tokens, for a cache."""

    def __init__(self, tokenizer: Any):
        self.special_tokens_map = tokenizer.special_tokens_map
        self._key = json.dumps(self.special_tokens_map, sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokens) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@cache
def _around(source: str, day: str, tokenizer: _Tokens) -> tuple[str, str]:
    asked = [{"role": "user", "content": "Question"}]
    render = partial(_render, source=source, tools=None, tokenizer=tokenizer, day=day)
    try:
        answered, _ = render([*asked, {"role": "assistant", "content": "gRoWb0mArK"}])
        question, _ = render(asked)
        prompt, _ = render(asked, add_generation_prompt=True)
    except ValueError:
        return "", ""
    before, mark, after = answered.partition("gRoWb0mArK")
    if not mark or not before.startswith(question) or not prompt.startswith(question):
        return "", after
    # Either may go on to a thought, which is not part of the header.
    return before[len(question) :][: _common_start(before[len(question) :], prompt[len(question) :])], after
