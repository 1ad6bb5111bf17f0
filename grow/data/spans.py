"""A row as text, and which of it is to be learnt."""

from collections.abc import Callable
from dataclasses import dataclass

Span = tuple[int, int]
"""Characters of a text, from the first up to, not including, the second."""
Guard = Callable[[str], str]
"""Is given every text that a row itself brings, and returns what stands for it (grow.data.special)."""


@dataclass(frozen=True)
class Text:
    """A row's text, without tokens at its begin or end, and which of it is to be learnt, in order."""

    text: str
    learnt: list[Span]
