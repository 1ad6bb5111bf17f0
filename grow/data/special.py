"""A row's own text never becomes a special token: "</s>" in a row about HTML ends nothing.

In the text of a template itself, special tokens are tokens. A tokenizer cannot tell the two apart. So in the few rows
that spell a special token, their own texts are broken up by a character that no text has, and the row is tokenised by a
copy of the tokenizer that knows the template's special tokens under other names, after the character has been removed.
"""

import json
import re
from bisect import bisect_right
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

BREAK = "\ufdd0"  # a code point that Unicode keeps free for uses inside a program
_NAME, _NAME_END = "\ufdd1", "\ufdd2"
PLACE = "\ufdd3"  # of an image (grow.data.images)
# Models write these themselves, as tokens: breaking them up would change how a chat template renders a turn.
_SPOKEN = re.compile(r"</?(think|thinking|tool_call|tool_response)>")


class SpecialTokens:
    """Knows the special tokens of a tokenizer, and keeps a row's own text apart from them."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.ids = {str(token): number for number, token in added if token.special and not _SPOKEN.match(str(token))}
        names = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._firsts = tuple({name[0] for name in names if name})

    def guard(self, text: str) -> str:
        """Breaks up text that spells a special token. Raises ValueError for text that holds a character used for
        that."""
        for own in (BREAK, _NAME, _NAME_END, PLACE):
            if own in text:
                raise ValueError(f"with the code point U+{ord(own):X}, which is no character")
        if not any(first in text for first in self._firsts) or not self._pattern.search(text):
            return text
        return self._pattern.sub(lambda found: found[0][:1] + BREAK + found[0][1:], text)

    def encode(self, text: str) -> tuple[Any, "Moved"]:
        """Tokenises a guarded text. Returns the encoding, with ids for `own_ids`, and how characters have moved."""
        moved = Moved(text, re.compile(f"{BREAK}|{self._pattern.pattern}"), self._renamed)
        return self._copy.encode(moved.text, add_special_tokens=False), moved

    def _renamed(self, found: str) -> str:
        return "" if found == BREAK else f"{_NAME}{self.ids[found]}{_NAME_END}"

    def own_ids(self, ids: list[int]) -> list[int]:
        """Returns the tokenizer's own ids. Raises ValueError where the tokenizer makes a special token of a row's
        text."""
        if any(number in self.own and number not in self._to_own for number in ids):
            raise ValueError("spells a special token, which the tokenizer cannot take for text")
        return [self._to_own.get(number, number) for number in ids]

    def removed(self, text: str) -> str:
        """Returns a text without the special tokens that it spells."""
        return self._pattern.sub("", text)

    @cached_property
    def own(self) -> set[int]:
        """Returns the ids of all special tokens."""
        return set(self.ids.values())

    @cached_property
    def _copy(self) -> Any:
        facts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        special = [token for token in facts["added_tokens"] if token["content"] in self.ids]
        facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] not in self.ids]
        facts["post_processor"] = facts["truncation"] = facts["padding"] = None
        copy = Tokenizer.from_str(json.dumps(facts))
        copy.add_special_tokens([
            AddedToken(self._renamed(token["content"]), single_word=False, lstrip=token["lstrip"],
                       rstrip=token["rstrip"], normalized=False, special=True)
            for token in special
        ])  # fmt: skip
        return copy

    @cached_property
    def _to_own(self) -> dict[int, int]:
        names = {self._copy.token_to_id(self._renamed(name)): number for name, number in self.ids.items()}
        return {number: own for number, own in names.items() if number is not None}


class Moved:
    """Holds a text in which some matches of a pattern were replaced, and says where its characters went."""

    def __init__(self, text: str, pattern: re.Pattern[str], replace: Any):
        parts, last, length = [], 0, 0
        self._ends, self._shifts = [0], [0]
        for found in pattern.finditer(text):
            parts += [text[last : found.start()], replace(found[0])]
            length += len(parts[-2]) + len(parts[-1])
            last = found.end()
            self._ends.append(last)
            self._shifts.append(length - last)
        self.text = "".join([*parts, text[last:]])

    def place(self, position: int) -> int:
        """Returns where the character that stood at this place stands now."""
        return position + self._shifts[bisect_right(self._ends, position) - 1]


def unguarded(text: str) -> Moved:
    """Returns a guarded text without the characters that break it up."""
    return Moved(text, re.compile(BREAK), lambda _: "")
