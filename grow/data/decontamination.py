"""Contaminated test rows: held-out rows that equal a training row, or share a 13-gram with one.

Thirteen words are the measure of GPT-3's report (Brown et al. 2020, arXiv 2005.14165, appendix C). Text is compared
in lower case and without punctuation (of whole rows, without that of sentences), column by column, since what a
template adds is the same in every row. In scripts
without spaces between words, a character with its marks counts as half a word. What stands in more than one of a
hundred training rows, and in more than ten, is of their kind and not of a row, such as an instruction or a system turn,
and does not count. Of a row with images these count alone: its question is often that of many rows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import regex

from grow.data.images import image_checksums
from grow.data.template import Template

Rows = tuple[Iterable[dict[str, Any]], Template]

WORDS = 13
_OFTEN = 10
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
# A character of such a script, or a word of any other: letters and digits with the vowel signs and accents after them.
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}_])+")
# Of a row as a whole, marks of sentences do not count; signs do, which tell rows of code, or of sums, apart.
_MARKS = regex.compile(r"[.,;:!?…\"'“”‘’«»]+(?![\p{L}\p{N}])|(?<![\p{L}\p{N}])[\"'“‘«]+")
_HALF = regex.compile(rf"[{_UNSPACED}]")


def contaminated(held_out: Sequence[Rows], training: Rows) -> list[set[int]]:
    """Returns, for each set of held-out rows, the indices of those that training rows contaminate.

    Rows come with their template. Only held-out rows are kept in memory, as hashes.
    """
    marked: dict[int, set[tuple[int, int]]] = {}
    for number, (rows, template) in enumerate(held_out):
        for index, row in enumerate(rows):
            for mark in _of_row(row, template):
                marked.setdefault(mark, set()).add((number, index))
    # How many training rows have each; of those that are whole rows, one will do.
    shared: Counter[int] = Counter()
    wholes: set[int] = set()
    rows, template = training
    count = 0
    for row in rows:
        count += 1
        marks = list(_of_row(row, template))
        wholes |= marked.keys() & set(marks[:1])
        shared.update(marked.keys() & set(marks[1:]))
    often = max(_OFTEN, count // 100)
    found: list[set[int]] = [set() for _ in held_out]
    for mark in wholes.union(mark for mark, times in shared.items() if times <= often):
        for number, index in marked[mark]:
            found[number].add(index)
    return found


def _of_row(row: dict[str, Any], template: Template) -> Iterator[int]:
    """Yields hashes of what a row shares with a row that contaminates it, first of the row as a whole."""
    images = image_checksums(row, template.images, template.image_root) if template.images else []
    if images:
        yield hash(tuple(images))
    yield from map(hash, images) if images else _marks(template.texts(row))


def _marks(texts: list[str]) -> Iterator[int]:
    """Yields hashes of the row as a whole, and of every 13 consecutive words in it."""
    whole = tuple(" ".join(_MARKS.sub(" ", text.lower()).split()) for text in texts)
    if not any(whole):
        return
    yield hash(whole)
    words = [_WORD.findall(text.lower()) for text in texts]
    for column in words:
        # Weights are in halves of a word; each run is as short as it can be.
        weights = [1 if _HALF.match(word) else 2 for word in column]
        first = total = 0
        for last, weight in enumerate(weights):
            total += weight
            while total - weights[first] >= 2 * WORDS:
                total -= weights[first]
                first += 1
            if total >= 2 * WORDS:
                yield hash(tuple(column[first : last + 1]))
