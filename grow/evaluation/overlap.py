"""Held-out rows that training rows give away: rows that are the same, or that share 13 words in a row.

Thirteen words are the measure of GPT-3's report (Brown et al. 2020, arXiv 2005.14165, appendix C). Text is compared
in lower case and without punctuation, column by column, since what a template adds is the same in every row.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grow.template import Template

Rows = tuple[Iterable[dict[str, Any]], Template]

WORDS = 13
_WORD = re.compile(r"\w+")


def overlapping(held_out: Sequence[Rows], training: Rows) -> list[set[int]]:
    """Of each set of held-out rows the indices of those that a training row gives away.

    Rows come with their template. Only what is held out is kept in memory, as hashes.
    """
    marked: dict[int, set[tuple[int, int]]] = {}
    for number, (rows, template) in enumerate(held_out):
        for index, row in enumerate(rows):
            for mark in _marks(template.texts(row)):
                marked.setdefault(mark, set()).add((number, index))
    found: list[set[int]] = [set() for _ in held_out]
    rows, template = training
    for row in rows:
        for mark in _marks(template.texts(row)):
            for number, index in marked.get(mark, ()):
                found[number].add(index)
    return found


def _marks(texts: list[str]) -> Iterator[int]:
    """Hashes of the row as a whole, and of every 13 words in a row in it."""
    words = [_WORD.findall(text.lower()) for text in texts]
    yield hash(tuple(map(tuple, words)))
    for column in words:
        for first in range(len(column) - WORDS + 1):
            yield hash(tuple(column[first : first + WORDS]))
