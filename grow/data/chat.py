"""A conversation as one text, and where in it the assistant speaks.

The whole conversation is rendered once by the chat template, and that is the text. A template with `{% generation %}`
marks the assistant's text itself. For other templates the conversation is rendered once more with marks around what the
assistant says: if that text without its marks is the first one, the marks are where they belong, however the template
moves or shortens turns. A conversation for which it is not is a bad row; a label never lands on other text.
"""

import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

from grow.data.conversation import Turn, conversation, is_learnt, listed
from grow.data.images import placed, values_of
from grow.data.rendering import GENERATION, render_chat
from grow.data.spans import Guard, Span, Text, common_start
from grow.data.special import Moved
from grow.errors import UserError

if TYPE_CHECKING:
    from grow.data.template import Template  # which imports this module

_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARK = re.compile("gRoW([bec])([0-9]+(?:x[0-9]+)?)mArK")


def chat_template(template: "Template", tokenizer: Any, tools: Any = None) -> str:
    """Returns the text of the chat template. Raises UserError where there is none."""
    if template.chat_template:
        return template.chat_template
    try:
        return tokenizer.get_chat_template(None, tools=tools)
    except ValueError:
        raise UserError(
            "the base's tokenizer has no chat template, which messages need: take the instruction-tuned base, or name "
            "a file with one in the field chat_template"
        ) from None


def conversation_text(row: Mapping[str, Any], template: "Template", tokenizer: Any, guard: Guard) -> Text:
    """Returns the text of a row's conversation, and the spans of the assistant's turns, each with what ends it.

    Raises ValueError for a conversation that the template refuses or does not write in full.
    """
    images = len(values_of(row, template.images)) if template.images else None
    asking = placed(guard) if images else guard
    turns = [
        _guarded(turn, guard if turn["role"] == "assistant" else asking)
        for turn in conversation(row, template.messages, images)
    ]
    tools = _guarded(listed(row["tools"], "tools"), guard) if row.get("tools") else None
    source = chat_template(template, tokenizer, tools)
    if tools and "tools" not in source:
        raise ValueError("with tools, which the chat template does not write")
    if any(turn.get("tool_calls") for turn in turns) and "tool_calls" not in source:
        raise ValueError("with tool calls, which the chat template does not write")
    learnt = [is_learnt(turn) for turn in turns if turn["role"] == "assistant"]
    if not any(learnt):
        raise ValueError("without an assistant's turn that is to be learnt")
    tokens = tokenizer.special_tokens_map
    render = partial(render_chat, source=source, tools=tools or None, tokens=tokens, day=template.day)
    text, spans = render(turns)
    if GENERATION.search(source):
        spans = _joined(spans)
        if not all(learnt) and len(spans) != len(learnt):
            raise ValueError(
                "which of the assistant's turns are to be learnt cannot be told in the chat template's text"
            )
    else:
        around = _header_and_end(source, template.day, json.dumps(tokens, sort_keys=True, default=str))
        spans = _marked_spans(text, turns, render, around, tokenizer)
        if not around[1] and spans[-1][1] == len(text) and tokenizer.eos_token:
            # The template ends a turn with the next one's beginning alone: what would end the last one is missing.
            spans[-1] = (spans[-1][0], len(text) + len(tokenizer.eos_token))
            text += tokenizer.eos_token
    if not all(learnt):
        spans = [span for span, wanted in zip(spans, learnt, strict=True) if wanted]
    spans = [(begin, end) for begin, end in spans if begin < end]
    if not any(text[begin:end].strip() for begin, end in spans):
        hint = "; with images one is needed that takes a turn's content as text" if template.images else ""
        raise ValueError(f"of what the assistant says the chat template writes nothing{hint}")
    _check_written(text, turns, render)
    return Text(text, spans)


def _joined(spans: list[Span]) -> list[Span]:
    """Joins spans that touch: a template may mark what is said and what ends it each."""
    found: list[Span] = []
    for begin, end in spans:
        touches = bool(found) and found[-1][1] == begin
        found[-1:] = [(found[-1][0], end)] if touches else [*found[-1:], (begin, end)]
    return found


def _check_written(text: str, turns: list[Turn], render: Any) -> None:
    """Raises ValueError for a turn, other than the assistant's, that the template leaves out."""
    for index, turn in enumerate(turns):
        said = turn["content"].strip()
        if turn["role"] == "assistant" or said in text:
            continue
        try:
            other, _ = render([*turns[:index], turn | {"content": f"{said} gRoW"}, *turns[index + 1 :]])
        except ValueError:  # a template that refuses the change has looked at the turn, at least
            continue
        if other == text:
            raise ValueError(f"with a turn of the role {turn['role']}, which the chat template does not write")


def _guarded(value: Any, guard: Guard) -> Any:
    """Guards every text in a conversation except its roles, keys and types."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, list):
        return [_guarded(item, guard) for item in value]
    if isinstance(value, dict):
        return {key: item if key in ("role", "type", "id") else _guarded(item, guard) for key, item in value.items()}
    return value


def _marked_spans(text: str, turns: list[Turn], render: Any, around: tuple[str, str], tokenizer: Any) -> list[Span]:
    header, end = around
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    with_marks, _ = render([_mark(turn, index) if index in spoken else turn for index, turn in enumerate(turns)])
    places: dict[tuple[str, str], int] = {}
    plain = Moved(with_marks, _MARK, lambda _: "")
    for mark in _MARK.finditer(with_marks):
        # Some templates write a thought under several names; the first begin and the last end count.
        key, place = (mark[1], mark[2]), plain.place(mark.end())
        places[key] = place if mark[1] == "e" else places.get(key, place)
    if plain.text != text:
        raise ValueError("what the assistant says cannot be told apart in the chat template's text")
    spans: list[Span] = []
    for index in spoken:
        floor = spans[-1][1] if spans else 0
        begin, finish = places.get(("b", str(index))), places.get(("e", str(index)))
        calls = [("c", f"{index}x{n}") for n in range(len(turns[index].get("tool_calls") or []))]
        if any(call not in places for call in calls):
            raise ValueError("with tool calls, which the chat template does not write")
        if calls:
            last = max(places[call] for call in calls)
            finish = _end_of_calls(text, render(turns[: index + 1])[0], last, end, tokenizer)
        begin, stop = _span(text, turns[index], begin, finish, floor, header, end)
        if begin < floor:
            raise ValueError("the chat template writes the assistant's turns in another order")
        if not header and begin == places.get(("b", str(index))) and _opens(text, turns[index], begin):
            lead, _ = render(turns[:index])
            if not floor <= len(lead) <= begin or not text.startswith(lead):
                raise ValueError("where the assistant's turn begins cannot be told in the chat template's text")
            begin = len(lead)
        own_end = bool(calls and end) and not text.startswith(end, stop)  # that of the calls, behind which `stop` is
        spans.append((begin, stop if own_end else _whole_end(text, stop, end, tokenizer)))
    return spans


def _end_of_calls(text: str, until: str, last: int, end: str, tokenizer: Any) -> int | None:
    """Returns where the calls of a turn end, the last of which begins at `last`; `until` is the conversation up to this
    turn, by itself. Where it does not end as others do, that is where the text goes on otherwise."""
    same = common_start(text, until)
    place = text.find(end, last, same) if end else -1
    if place >= 0 or same <= last:
        return place if place >= 0 else None
    token = _token_across(text, last, same, tokenizer)
    return token.start() if token else same


def _opens(text: str, turn: Turn, begin: int) -> bool:
    """Says whether a turn begins with a call or a thought, before which a template puts text that is learnt too."""
    thoughts = [turn[name].strip() for name in _REASONING if isinstance(turn.get(name), str)]
    return bool(turn.get("tool_calls")) or any(thought and text.startswith(thought, begin) for thought in thoughts)


def _whole_end(text: str, stop: int, end: str, tokenizer: Any) -> int:
    """Returns where a turn ends, with as much of `end` as stands there; never within a special token.

    The last turn may end otherwise than those before it: with another token, or one more. Where turns end with nothing,
    the token that begins the next one ends it.
    """
    if not end:
        token = _special_tokens(tokenizer, len(tokenizer)).match(text, stop)
        return token.end() if token else stop
    place = stop + common_start(text[stop : stop + len(end)], end)
    if place - stop == len(end):
        return place
    token = _token_across(text, stop, place, tokenizer)
    if token is None:
        return place
    return token.end() if token.start() == stop else token.start()


def _token_across(text: str, since: int, place: int, tokenizer: Any) -> re.Match[str] | None:
    """Returns the special token, of those that begin at `since` or later, that a place lies within."""
    for token in _special_tokens(tokenizer, len(tokenizer)).finditer(text, since):
        if token.start() >= place:
            break
        if place < token.end():
            return token
    return None


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any, size: int) -> re.Pattern[str]:
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _mark(turn: Turn, index: int) -> Turn:
    """Marks the text of a turn, inside the white space around it, which templates trim."""
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
        calls = enumerate(turn["tool_calls"])
        turn["tool_calls"] = [_marked_call(call, f"{begin}gRoWc{index}x{number}mArK") for number, call in calls]
    return turn


def _marked_call(call: Turn, begin: str) -> Turn:
    inner = call.get("function", call)
    inner = inner | {"name": begin + inner["name"]}
    return call | {"function": inner} if "function" in call else inner


def _span(text: str, turn: Turn, begin: int | None, finish: int | None, floor: int, header: str, end: str) -> Span:
    """Returns where a turn begins, and where the text that ends it begins."""
    more = bool(turn.get("tool_calls")) or any(turn.get(name) for name in _REASONING)
    core = turn["content"].strip()
    if finish is None and core and not turn.get("tool_calls"):
        if begin is None:
            raise ValueError("of what the assistant says the chat template writes nothing")
        raise ValueError("the chat template cuts off what the assistant says")
    lead, _, trail = turn["content"].partition(core) if core else ("", "", "")
    if begin is None:  # the template writes the turn without its begin, a thought most of all
        assert finish is not None
        begin = _begin_of_rest(text, core, floor, finish, header)
    place = text.rfind(header, floor, begin) if header else -1
    before = place + len(header) if place >= 0 else floor
    said = place >= 0 and text[before:begin].strip() != ""
    if more or said:  # learnt with what the template puts before it, such as an empty thought: the model must write it
        begin = before if place >= 0 else begin
    elif place >= 0:  # the turn's own white space, where the template keeps it
        begin -= _common_end(text[before:begin], lead)
    if finish is None:
        raise ValueError("where the assistant's turn ends cannot be told in the chat template's text")
    if not turn.get("tool_calls") and not text.startswith(end or "\0", finish):
        finish += common_start(text[finish:], trail)
    return begin, finish


def _begin_of_rest(text: str, core: str, floor: int, finish: int, header: str) -> int:
    """Returns where a turn begins if the template writes only its rest, up to `finish`, and perhaps the thought before
    it."""
    same = _common_end(text[floor:finish], core)
    if same == len(core):
        return finish - same
    thought, closed, rest = core.rpartition("</think>")
    if closed:
        same = min(same, len(rest))
    begin = finish - len(core[len(core) - same :].lstrip())
    place = text.rfind(header, floor, begin) if header else -1
    before = place + len(header) if place >= 0 else begin
    thought = thought.rpartition("<think>")[2].strip()
    # The text between is the thought, written another way, or the turn's own white space.
    between = text[before:begin]
    return before if (thought and thought in between) or (between.isspace() and rest.startswith(between)) else begin


def _common_end(one: str, other: str) -> int:
    return common_start(one[::-1], other[::-1])


@cache
def _header_and_end(source: str, day: str, tokens: str) -> tuple[str, str]:
    """Returns the text before and after an assistant's turn, in a conversation of two; "" where that cannot be told.

    `tokens` is the tokenizer's special_tokens_map as JSON.
    """
    asked = [{"role": "user", "content": "Question"}]
    render = partial(render_chat, source=source, tools=None, tokens=json.loads(tokens), day=day)
    try:
        answered, _ = render([*asked, {"role": "assistant", "content": "gRoWb0mArK"}])
        question, _ = render(asked)
        prompt, _ = render(asked, add_generation_prompt=True)
    except ValueError:
        return "", ""
    before, mark, after = answered.partition("gRoWb0mArK")
    asked_until = common_start(question, prompt)  # a question alone may end in what ends a text
    if not mark or "Question" not in question[:asked_until] or not before.startswith(question[:asked_until]):
        return "", after
    # Either may go on to a thought, which is not part of the header.
    return before[asked_until : common_start(before, prompt)], after
