"""A row as text, and the spans of it that are to be learnt."""

from collections.abc import Callable
from dataclasses import dataclass

Span = tuple[int, int]
"""Characters of a text, from the first up to, not including, the second."""
Guard = Callable[[str], str]
"""Replaces each text that comes from the row itself (grow.data.special)."""


@dataclass(frozen=True)
class Text:
    """Holds a row's text, without the tokens that begin and end it, and its spans that are to be learnt, in order."""

    text: str
    learnt: list[Span]
