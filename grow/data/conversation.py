"""A row's conversation: turns in the usual formats, brought into one."""

import json
from collections.abc import Mapping
from typing import Any

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
          "function": "tool", "observation": "tool", "function_call": "assistant"}  # fmt: skip
_FLAGS = ("train", "training", "weight", "loss")

Turn = dict[str, Any]
PLACEHOLDER = "<image>"
"""Says in a row's text where an image stands (grow.data.images)."""


def conversation(row: Mapping[str, Any], column: str, images: int | None = None) -> list[Turn]:
    """Returns a row's turns, {"role", "content"} with a text in each. ShareGPT's names and parts of text are
    understood; and parts that are images, where the row may have some: PLACEHOLDER says where each stands, and without
    one all of its `images` stand before what the user says first.

    Raises ValueError for anything that is not a conversation.
    """
    turns = row.get(column)
    if isinstance(turns, str):
        turns = _from_json(turns, "the messages")
    if not isinstance(turns, list) or not turns:
        raise ValueError("without an assistant's turn")
    read = (_turn(turn, images is not None) for turn in turns)
    found = [turn for turn in read if turn["content"] or turn["role"] != "system"]
    first = next((turn for turn in found if turn["role"] == "user"), None)
    if images and first and not any(PLACEHOLDER in turn["content"] for turn in found if turn["role"] != "assistant"):
        first["content"] = PLACEHOLDER * images + first["content"]
    if not any(turn["role"] == "assistant" for turn in found):
        raise ValueError("without an assistant's turn")
    return found


def _turn(turn: Any, images: bool) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError("a turn that is not an object with role and content")
    # Typed columns give every turn all keys; a null means that the turn does not have the key.
    turn = {key: value for key, value in turn.items() if value is not None}
    role = turn.pop("from", None) if "role" not in turn and "from" in turn else turn.get("role")
    content = turn.pop("value", None) if "content" not in turn and "value" in turn else turn.get("content")
    if not isinstance(role, str):
        raise ValueError("a turn without a role")
    if role == "function_call":  # ShareGPT writes a call, or several, as the text of a turn
        calls = _from_json(content, "a function_call's value") if isinstance(content, str) else content
        calls = calls if isinstance(calls, list) else [calls]
        turn["tool_calls"], content = [{"type": "function", "function": call} for call in calls], None
    turn["role"] = _ROLES.get(role, role)
    if "tool_calls" in turn:
        turn["tool_calls"] = [_tool_call(call) for call in listed(turn["tool_calls"], "tool_calls")]
    allow_empty = bool(turn.get("tool_calls")) or turn["role"] in ("system", "tool")
    turn["content"] = _content(content, allow_empty, images and turn["role"] != "assistant")
    try:
        json.dumps(turn, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    return turn


def is_learnt(turn: Turn) -> bool:
    """Says whether an assistant's turn is to be learnt, which "train": false or "weight": 0 in it rule out.

    Raises ValueError for a weight between 0 and 1, or for weights of parts of a turn.
    """
    if turn.get("train_detail") or turn.get("training_detail"):
        raise ValueError("a turn of which a part is to be learnt")
    flags = [turn[name] for name in _FLAGS if name in turn]
    if any(isinstance(flag, str) or flag not in (0, 1) for flag in flags):
        raise ValueError(f"a turn whose {' or '.join(name for name in _FLAGS if name in turn)} is neither 0 nor 1")
    return all(flags)


def _content(content: Any, allow_empty: bool, images: bool) -> str:
    if isinstance(content, list):
        content = [{"text": PLACEHOLDER} if images and _is_image(part) else part for part in content]
        if not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) and "text" in str(part.get("type", "text"))
            for part in content
        ):
            raise ValueError("a part of a turn that is not text" + " or, of one that asks, of the type image" * images)
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"a turn whose content is not text but {type(content).__name__}")
    if not (content or "").strip() and not allow_empty:
        raise ValueError("an empty turn")
    return content or ""


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image" and not any(map(part.get, ("image", "url", "path")))


def _tool_call(call: Any) -> Any:
    if not isinstance(call, dict):
        raise ValueError("a tool call that is not an object")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError("a tool call without a name")
    inner = {key: value for key, value in inner.items() if value is not None}
    if isinstance(inner.get("arguments"), str):  # OpenAI writes them as JSON; templates expect the object
        inner["arguments"] = _from_json(inner["arguments"] or "{}", "a tool call's arguments")
    return call | {"function": inner} if "function" in call else inner


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{what} are a text that is not JSON") from None


def listed(value: Any, what: str) -> list[Any]:
    """Returns a list, which may be written as JSON. Raises ValueError for anything else."""
    value = _from_json(value, what) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise ValueError(f"{what} that is not a list")
    return value
