"""A row as text, and the spans of it that are to be learnt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
"""Characters of a text, from the first up to, not including, the second."""
Guard = Callable[[str], str]
"""Replaces each text that comes from the row itself (grow.data.special)."""


@dataclass(frozen=True)
class Text:
    """Holds a row's text, without the tokens that begin and end it, and its spans that are to be learnt, in order."""

    text: str
    learnt: list[Span]


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns how many characters, or tokens, two sequences have in common at their beginnings."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
